"""Attention over packed rows, segment by segment: no score is computed between tokens that do not see each other.

Registered with transformers under the name `SEGMENTS`. A model that was loaded with it takes `segments` besides its
usual arguments; without them, as in generation, it attends as with "sdpa".
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from basalt.data.packing import Segments

SEGMENTS = "basalt_segments"
FLASH = (torch.bfloat16, torch.float16)  # what the kernel for sequences of varying lengths takes


@torch.compiler.disable()  # the segments of every batch are others: compiled, each would be a graph of its own
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `query` `[R, heads, T, D]`, `key` and `value` `[R, kv_heads, T, D]` to
    `[R, T, heads, D]`."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    rows, heads, length, width = query.shape
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # [R·T, heads, D] each
    if query.is_cuda and query.dtype in FLASH:
        attended = _at_once(q, k, v, segments, scaling)
    else:
        attended = _one_by_one(q, k, v, segments, segments.lengths, scaling)
    return attended.view(rows, length, heads, width), None


@torch.compiler.disable()
def attend_where_learned(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """Attention of the learned positions alone: `query` `[learned, heads, D]`, `key` and `value`
    `[R·T, kv_heads, D]` to `[learned, heads, D]`."""
    return _one_by_one(query, key, value, segments, segments.learned_lengths, scaling)


def _at_once(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """One call of flash attention, whose causal mask ends at the last query and the last key of each segment."""
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query,
        key[segments.keys],
        value[segments.keys],
        segments.query_ends,
        segments.key_ends,
        segments.longest_query,
        segments.longest_keys,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, lengths: list[int], scaling: float | None
) -> Tensor:
    again = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(again, 1) if again > 1 else states for states in (key, value))
    queries, places = query.split(lengths), segments.learned_at.split(segments.learned_lengths)
    keys, values = key.split(segments.lengths), value.split(segments.lengths)
    attended = []
    for number, (begins, prefix) in enumerate(segments.prefixes):
        q, k, v = queries[number], keys[number], values[number]
        if not len(q):
            continue
        mask = None
        if len(q) < len(k):
            mask = torch.arange(len(k), device=k.device) <= places[number][:, None]
        elif prefix:
            mask = torch.ones(len(q), len(k), dtype=torch.bool, device=k.device).tril()
        if mask is not None and prefix:
            k, v = torch.cat([keys[begins][:prefix], k]), torch.cat([values[begins][:prefix], v])
            mask = torch.cat([mask.new_ones(len(q), prefix), mask], dim=1)
        q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        attended.append(seen[0].transpose(0, 1))
    return torch.cat(attended) if attended else query[:0]  # nothing is learned where all of a pass was dropped


AttentionInterface.register(SEGMENTS, attend)
AttentionMaskInterface.register(SEGMENTS, sdpa_mask)
