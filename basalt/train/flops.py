"""Model FLOPs utilisation: what the model's arithmetic takes, over what the device could do in the same time.

Counted as in PaLM (Chowdhery et al. 2022, appendix B), for frozen weights without the product that gives their
gradient: two operations a weight and token in the forward pass, two for the gradient of the input, two for that of a
trained weight; attention by the pairs of tokens that see each other. What is recomputed, padding, and the tower do
not count.
"""

import time
from typing import Any

import torch
from torch import nn

from basalt.data.packing import Packed
from basalt.model.multimodal_llama import MultimodalLlama

# Dense tensor-core rates in bf16 by NVIDIA's data sheets, operations a second; the first name that fits counts.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
         "RTX 4090": 165e12, "RTX 3090": 71e12, "B200": 2250e12}  # fmt: skip


class FlopCounter:
    """Operations that a pass of training takes."""

    def __init__(self, model: MultimodalLlama) -> None:
        lm: Any = model.causal_lm
        self._token = sum(map(_operations, lm.model.layers.modules()))
        self._visual_token = sum(map(_operations, model.projector.modules()))
        self._learned_token = _operations(lm.lm_head)
        head_dim = getattr(lm.config, "head_dim", None) or lm.config.hidden_size // lm.config.num_attention_heads
        self._pair = 12 * lm.config.num_hidden_layers * lm.config.num_attention_heads * head_dim
        self._image_token_id = model.image_token_id

    def of(self, batch: Packed) -> float:
        """`batch` on the CPU: nothing waits for the device."""
        real = batch.groups >= 0
        pairs = int((batch.positions[real] + 1).sum())  # a token sees as many as its position says
        visual = int((batch.ids == self._image_token_id).sum())
        linear = self._token * int(real.sum()) + self._visual_token * visual + self._learned_token * len(batch.target)
        return linear + self._pair * pairs


def _operations(module: nn.Module) -> int:
    """Of a linear layer, for one token: forward, the input's gradient and, where it is trained, the weight's."""
    if not isinstance(module, nn.Linear):
        return 0
    return module.in_features * module.out_features * (6 if module.weight.requires_grad else 4)


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's operations a second: by its data sheet; of a CPU, what a large product reaches; None: not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((rate for known, rate in PEAKS.items() if known in name), None)
    side = 1536
    a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        began = time.monotonic()
        torch.mm(a, b)
        best = min(best, time.monotonic() - began)
    return 2 * side**3 / best
