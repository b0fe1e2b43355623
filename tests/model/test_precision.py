"""The precision that `auto` means, on this machine's own CPU: the one whose products are the faster."""

import time

import pytest
import torch

from basalt.model.precision import dtype_of, fast_bfloat16, name_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_what_is_named_is_taken(name: str) -> None:
    assert name_of(dtype_of(name, CPU)) == name


def test_a_gpu_computes_in_bfloat16() -> None:
    assert dtype_of("auto", torch.device("cuda", 0)) == torch.bfloat16


def test_auto_is_the_faster_one_on_this_cpu() -> None:
    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        best = float("inf")
        for _ in range(20):
            began = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - began)
        return best

    assert dtype_of("auto", CPU) == (torch.bfloat16 if fast_bfloat16(CPU) else torch.float32)
    other = torch.float32 if fast_bfloat16(CPU) else torch.bfloat16
    assert seconds(dtype_of("auto", CPU)) < 1.5 * seconds(other)
