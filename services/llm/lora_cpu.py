"""LoRA on a CPU, by one small matrix product per LoRA in the batch.

vLLM's torch fallback copies a LoRA's weights once per *token*, and takes the marker for "no LoRA" (-1) as an index:
a plain request batched with others is answered with the last LoRA. This wrapper groups the batch's rows by LoRA
instead, once per engine step.
"""

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows = slice | torch.Tensor


class GroupedLoRA(PunicaWrapperCPU):
    groups: list[tuple[int, Rows]]  # (LoRA slot, its rows in the batch); rows without a LoRA are in none

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: object,
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slots = self.token_lora_indices
        present = slots.unique().tolist()
        if len(present) == 1:  # nearly always: no copying of rows
            self.groups = [(slot, slice(0, len(slots))) for slot in present if slot >= 0]
        else:
            self.groups = [(slot, (slots == slot).nonzero().flatten()) for slot in present if slot >= 0]

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
        x = x.view(-1, x.shape[-1])
        y = y.view(-1, y.shape[-1])
        for slot, rows in self.groups:
            inputs = x[rows]
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                update = inputs @ a[slot, 0].T @ b[slot, 0].T
                y[rows, start : start + width] += update if scale == 1.0 else scale * update
                start += width
