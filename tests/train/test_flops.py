"""The count by formula is what torch counts, operation by operation."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from basalt.data.grouping import Group
from basalt.data.packing import pack
from basalt.data.preprocess import IGNORE, Sample
from basalt.model.multimodal_llama import MultimodalLlama
from basalt.model.projector import Projector
from basalt.train.flops import FlopCounter, peak

IMAGE, TOKENS = 7, 16


@pytest.mark.parametrize("trained", [False, True])
def test_operations_are_those_torch_counts(trained: bool) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, attn_implementation="eager",
    )  # fmt: skip
    lm = LlamaForCausalLM(config).requires_grad_(False)
    if trained:
        lm.model.layers.requires_grad_(True)
    model = MultimodalLlama(None, Projector(24, 32, 64), lm, IMAGE)
    answer = Sample([11, 12, 13, 14], [IGNORE, 12, 13, 14])
    batch = pack([[Group(("a",), [IMAGE] * TOKENS, [answer])]], TOKENS + 4, pad_id=0)
    with FlopCounterMode(display=False) as counted:
        model.packed_loss(batch, torch.randn(1, TOKENS, 24)).backward()
    # Attention over a whole row, as it runs here, also computes the half that is masked.
    length = TOKENS + 4
    masked = 12 * 3 * 64 * (length**2 - length * (length + 1) // 2)
    assert FlopCounter(model).of(batch) + masked == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_a_cpu_s_peak_is_measured() -> None:
    rate = peak(torch.device("cpu"), torch.float32)
    assert rate is not None
    assert 1e8 < rate < 1e14
