"""What the tests compare of two runs."""

from pathlib import Path

import torch
from torch import Tensor

from basalt.train.checkpoints import learned


def masters(run: Path) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in learned(run)["optimizer"]["masters"].items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
