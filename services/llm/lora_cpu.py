"""LoRA on a CPU, by two matrix products for a whole module and all the LoRAs of a batch.

vLLM's torch fallback copies a LoRA's weights once per *token*, and takes the marker for "no LoRA" (-1) as an index:
a plain request batched with others is answered with the last LoRA. Here every row goes through the LoRAs of all the
batch at once, and what is not its own is taken out in between, where a row is only as wide as their ranks. A small
product costs a CPU mostly the call, so few products are faster than small ones, from one row to some thousands.
"""

from typing import NamedTuple

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class Stack(NamedTuple):
    """The LoRAs of one module, all its slices (q, k and v; gate and up) in one, every slot's."""

    down: torch.Tensor  # [slots, slices · rank, in]
    up: torch.Tensor  # [slots, slices · rank, out]; each slice's outputs from its own ranks, else zeros


class MaskedLoRA(PunicaWrapperCPU):
    slots: slice | None  # the least range that holds every LoRA of the batch; None where there is none
    foreign: torch.Tensor | None  # [rows, slots in the range, 1]: not the row's own; None where all have the same

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
        rows = self.token_lora_indices  # each one's slot, -1 for none
        present = [slot for slot in rows.unique().tolist() if slot >= 0]
        self.slots = slice(present[0], present[-1] + 1) if present else None
        self.foreign = None
        if self.slots is not None and (len(present) > 1 or bool((rows < 0).any())):
            self.foreign = (rows[:, None] != torch.arange(self.slots.start, self.slots.stop)).unsqueeze(2)

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
        if self.slots is None:
            return
        first = lora_a_stacked[0]
        if id(first) not in self._stacks:
            self._stacks[id(first)] = stack(lora_a_stacked, lora_b_stacked), first
        down, up = self._stacks[id(first)][0]
        hidden = x.view(-1, x.shape[-1]) @ down[self.slots].flatten(0, 1).T  # [rows, slots · slices · rank]
        if self.foreign is not None:
            hidden.view(len(hidden), -1, down.shape[1]).masked_fill_(self.foreign, 0)
        y.view(-1, y.shape[-1]).addmm_(hidden, up[self.slots].flatten(0, 1), alpha=scale)

    def add_lora_logits(self, *_: object, **__: object) -> None:
        """Nothing: no LoRA here reaches the logits (`LORA_MODULES`), though vLLM has weights for it."""


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
