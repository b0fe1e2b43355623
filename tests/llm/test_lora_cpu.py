"""Rows of a batch get their own LoRA, and rows without one get none."""

import pytest
import torch

pytest.importorskip("vllm", reason="the llm extra is not installed")

from vllm.lora.layers import LoRAMapping

from services.llm.lora_cpu import GroupedLoRA

SLOTS, RANK, INPUTS, SLICES = 2, 4, 8, (6, 3)


@pytest.mark.parametrize("ids", [(1, 1, 1), (2, 2), (0, 0), (0, 1, 2, 2, 0, 1)], ids=str)
def test_each_row_gets_its_own_lora(ids: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS) for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, width, RANK) for width in SLICES)
    x, before = torch.randn(len(ids), INPUTS), torch.randn(len(ids), sum(SLICES))

    wrapper = GroupedLoRA(max_num_batched_tokens=16, max_batches=8, device="cpu")
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [1, 2], SLOTS, vocab_size=100)
    after = before.clone()
    wrapper.add_lora_linear(after, x, a, b, 0.5, SLICES)

    for row, lora in enumerate(ids):
        update = torch.zeros(sum(SLICES))
        if lora:
            update = 0.5 * torch.cat([b[i][lora - 1, 0] @ a[i][lora - 1, 0] @ x[row] for i in range(len(SLICES))])
        torch.testing.assert_close(after[row], before[row] + update)
