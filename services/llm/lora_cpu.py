"""LoRA on a CPU, by two matrix products for a whole module and many rows.

vLLM's torch fallback copies a LoRA's weights once per *token*, and takes the marker for "no LoRA" (-1) as an index:
a plain request batched with others is answered with the last LoRA. Here rows that are written token by token go through
the LoRAs of all of them at once, and what is not a row's own is taken out in between, where a row is only as wide as
their ranks: a small product costs a CPU mostly the call. A prompt's rows are many and of one LoRA, and go through no
other.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

LONG = 64  # rows of one LoRA in a row from which products of their own are faster than wider ones together


class Stack(NamedTuple):
    """The LoRAs of one module, all its slices (q, k and v; gate and up) in one, every slot's."""

    down: torch.Tensor  # [slots, slices · rank, in]
    up: torch.Tensor  # [slots, slices · rank, out]; each slice's outputs from its own ranks, else zeros


class Segment(NamedTuple):
    """Rows that go through the same LoRAs."""

    rows: slice
    slots: slice  # the least range that holds the LoRAs of all rows
    foreign: torch.Tensor | None  # [rows, slots in the range, 1]: not the row's own; None where all have the same


class MaskedLoRA(PunicaWrapperCPU):
    segments: list[Segment]  # without the rows that have no LoRA, as far as they stand together

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: object):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._stacks: dict[int, tuple[Stack, torch.Tensor]] = {}  # by the id of a module's first A, which is kept alive

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: object,
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.segments = list(segments(self.token_lora_indices))

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: object,
    ) -> None:
        """y [rows, sum(output_slices)] += scale · x [rows, in] · Aᵀ [in, rank] · Bᵀ [rank, slice], each slice its own.

        Stacked weights hold every slot: A is [slots, 1, rank, in], B is [slots, 1, slice, rank].
        """
        if not self.segments:
            return
        first = lora_a_stacked[0]
        if id(first) not in self._stacks:
            self._stacks[id(first)] = stack(lora_a_stacked, lora_b_stacked), first
        down, up = self._stacks[id(first)][0]
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for rows, slots, foreign in self.segments:
            hidden = x[rows] @ down[slots].flatten(0, 1).T  # [rows, slots · slices · rank]
            if foreign is not None:
                hidden.view(len(hidden), -1, down.shape[1]).masked_fill_(foreign, 0)
            y[rows].addmm_(hidden, up[slots].flatten(0, 1), alpha=scale)

    def add_lora_logits(self, *_: object, **__: object) -> None:
        """Nothing: no LoRA here reaches the logits (`LORA_MODULES`), though vLLM has weights for it."""


def segments(slots: torch.Tensor) -> Iterator[Segment]:
    """Rows [rows] by their slots (-1: no LoRA), in order: long runs of one LoRA alone, what is between together."""
    start = end = 0  # of the rows between long runs
    for length in torch.unique_consecutive(slots, return_counts=True)[1].tolist():
        if length >= LONG:
            yield from segment(slots, slice(start, end))
            yield from segment(slots, slice(end, end + length))
            start = end + length
        end += length
    yield from segment(slots, slice(start, end))


def segment(slots: torch.Tensor, rows: slice) -> Iterator[Segment]:
    """One for these rows, or none if none of them has a LoRA."""
    own = slots[rows]
    present = [slot for slot in own.unique().tolist() if slot >= 0]
    if present:
        span = slice(present[0], present[-1] + 1)
        alone = len(present) == 1 and bool((own >= 0).all())
        yield Segment(rows, span, None if alone else (own[:, None] != torch.arange(span.start, span.stop)).unsqueeze(2))


def stack(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> Stack:
    """Moves a module's weights into one pair of tensors; `a` and `b` become views of them, for vLLM to write to."""
    rank = a[0].shape[2]
    with torch.inference_mode(False):  # vLLM writes to them outside of it
        down = torch.cat([each[:, 0] for each in a], dim=1)
        up = down.new_zeros(*down.shape[:2], sum(each.shape[2] for each in b))
        start = 0
        for i, (a_slice, b_slice) in enumerate(zip(a, b, strict=True)):
            ranks, outputs = slice(i * rank, (i + 1) * rank), slice(start, start + b_slice.shape[2])
            view = up[:, ranks, outputs].mT.unsqueeze(1)
            view.copy_(b_slice)
            a_slice.data, b_slice.data = down[:, ranks].unsqueeze(1), view
            start = outputs.stop
    return Stack(down, up)
