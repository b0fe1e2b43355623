"""What tests of runs share."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from basalt.train.checkpoints import learned
from basalt.train.loop import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="compiling needs a C++ compiler")


def masters(run: Path) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in learned(run)["optimizer"]["masters"].items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
