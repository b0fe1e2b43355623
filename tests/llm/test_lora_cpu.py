"""Rows of a batch get their own LoRA, and rows without one get none."""

import pytest
import torch

pytest.importorskip("vllm", reason="the llm extra is not installed")

from vllm.lora.layers import LoRAMapping

from services.llm.lora_cpu import LONG, MaskedLoRA

SLOTS, RANK, INPUTS, SLICES = 2, 4, 8, (6, 3)


PROMPT = (2,) * LONG
BATCHES = {
    "one": (1, 1, 1),
    "the second": (2, 2),
    "none": (0, 0),
    "mixed": (0, 1, 2, 2, 0, 1),
    "a prompt between": (1, 2, 0, *PROMPT, 1, 0),
    "prompts next to each other": (*PROMPT, *(1,) * LONG, *(0,) * LONG, 2),
}


@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES)
def test_each_row_gets_its_own_lora(ids: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS) for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, width, RANK) for width in SLICES)
    x, before = torch.randn(len(ids), INPUTS), torch.randn(len(ids), sum(SLICES))

    wrapper = MaskedLoRA(max_num_batched_tokens=256, max_batches=8, device="cpu")
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [1, 2], SLOTS, vocab_size=100)
    after = before.clone()
    wrapper.add_lora_linear(after, x, a, b, 0.5, SLICES)

    for row, lora in enumerate(ids):
        update = torch.zeros(sum(SLICES))
        if lora:
            update = 0.5 * torch.cat([b[i][lora - 1, 0] @ a[i][lora - 1, 0] @ x[row] for i in range(len(SLICES))])
        torch.testing.assert_close(after[row], before[row] + update)


def test_a_lora_that_is_written_later_counts_and_the_others_stay() -> None:
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS) for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, width, RANK) for width in SLICES)
    x = torch.randn(2, INPUTS)
    wrapper = MaskedLoRA(max_num_batched_tokens=256, max_batches=8, device="cpu")
    wrapper.update_metadata(LoRAMapping((1, 2), (1, 2), is_prefill=True), [1, 2], SLOTS, vocab_size=100)

    def update() -> torch.Tensor:
        y = torch.zeros(2, sum(SLICES))
        wrapper.add_lora_linear(y, x, a, b, 1.0, SLICES)
        return y

    first = update()
    for each in (*a, *b):  # as vLLM does when it gives the slot to another
        each[0].copy_(torch.randn_like(each[0]))
    second = update()
    expected = torch.cat([b[i][0, 0] @ a[i][0, 0] @ x[0] for i in range(len(SLICES))])
    torch.testing.assert_close(second[0], expected)
    torch.testing.assert_close(second[1], first[1])
