"""The LM's last decoder layer, run only at positions where something is learned.

Nothing after it looks at the others: they are needed as keys and values alone. So a layer's queries, output
projection and MLP shrink to the few per cent of positions that have a label, with the same loss and gradients.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from basalt.data.packing import Segments
from basalt.model.attention import SEGMENTS, attend_where_learned

ALIKE = ("llama", "mistral", "qwen2")  # model types whose layers are made of the parts named below


def train_by_segments(lm: Any) -> None:
    """Has a causal LM of transformers attend by segments; given them, its last hidden state is
    `[1, learned, lm_dim]`. An LM of another make than `ALIKE` runs its last layer whole, and gives the same."""
    lm.set_attn_implementation(SEGMENTS)
    layer = lm.model.layers[-1]
    whole, narrow = layer.forward, lm.config.model_type in ALIKE

    def forward(hidden_states: Tensor, *, segments: Segments | None = None, **options: Any) -> Tensor:
        if segments is None:
            return whole(hidden_states, **options)
        if narrow:
            return _where_learned(layer, hidden_states, segments, *options["position_embeddings"])
        return whole(hidden_states, segments=segments, **options).flatten(0, 1)[segments.learned][None]

    layer.forward = forward


def _where_learned(layer: Any, hidden: Tensor, segments: Segments, cos: Tensor, sin: Tensor) -> Tensor:
    attention: Any = layer.self_attn
    hidden, cos, sin = hidden.flatten(0, 1), cos.flatten(0, 1)[:, None], sin.flatten(0, 1)[:, None]  # cos: [R·T, 1, D]
    normed = layer.input_layernorm(hidden)
    learned = segments.learned

    def heads(projection: nn.Module, states: Tensor) -> Tensor:
        return projection(states).unflatten(-1, (-1, attention.head_dim))

    def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return states * cos + rotate_half(states) * sin

    query = turned(heads(attention.q_proj, normed[learned]), cos[learned], sin[learned])
    key = turned(heads(attention.k_proj, normed), cos, sin)
    value = heads(attention.v_proj, normed)
    attended = attend_where_learned(query, key, value, segments, attention.scaling)
    hidden = hidden[learned] + attention.o_proj(attended.flatten(1))
    return (hidden + layer.mlp(layer.post_attention_layernorm(hidden)))[None]
