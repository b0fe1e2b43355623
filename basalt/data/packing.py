"""Packing: rows of groups laid out as tensors, in which each conversation sees only itself and its group's beginning.

Positions go on from the prefix, so every branch computes what it would alone, while the image is run through the
LM once for all its questions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from basalt.data.grouping import Group
from basalt.data.preprocess import IGNORE

PREFIX = 0  # branch number of a group's prefix


@dataclass(frozen=True)
class Packed:
    """A batch of rows, `[R, T]` each.

    `source` and `target` list what is learned: the hidden state at flat position `source[k]` predicts token
    `target[k]`. A prefix's last position may predict the first token of several branches.
    """

    ids: Tensor
    positions: Tensor
    groups: Tensor  # group number, -1 is padding
    branches: Tensor
    source: Tensor  # [K], into R·T
    target: Tensor  # [K]
    images: list[str]  # in the order of their visual tokens

    def to(self, device: torch.device) -> "Packed":
        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Packed(
            there(self.ids),
            there(self.positions),
            there(self.groups),
            there(self.branches),
            there(self.source),
            there(self.target),
            self.images,
        )

    def attention_mask(self) -> Tensor:
        """Boolean `[R, 1, T, T]`: causal, within a group, and there to the prefix or the own branch."""
        rows, length = self.ids.shape
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        same_group = self.groups[:, :, None] == self.groups[:, None, :]
        visible = (self.branches[:, None, :] == PREFIX) | (self.branches[:, :, None] == self.branches[:, None, :])
        return (causal & same_group & visible)[:, None].expand(rows, 1, length, length)


def pack(rows: list[list[Group]], length: int, pad_id: int) -> Packed:
    """Lays rows of groups out as tensors of `[len(rows), length]`."""
    shape = (len(rows), length)
    ids = torch.full(shape, pad_id)
    positions, branches = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    numbers = torch.full(shape, -1)
    source: list[int] = []
    target: list[int] = []
    images: list[str] = []
    for r, row in enumerate(rows):
        at = 0
        for number, group in enumerate(row):
            images += group.images
            begin, prefix_length = at, len(group.prefix)
            end = begin + len(group)
            ids[r, begin:end] = torch.tensor(group.prefix + [token for b in group.branches for token in b.ids])
            numbers[r, begin:end] = number
            positions[r, begin : begin + prefix_length] = torch.arange(prefix_length)
            at = begin + prefix_length
            for branch_number, branch in enumerate(group.branches, start=1):
                span = slice(at, at + len(branch.ids))
                branches[r, span] = branch_number
                positions[r, span] = torch.arange(prefix_length, prefix_length + len(branch.ids))
                for i, label in enumerate(branch.labels):
                    if label != IGNORE and (i or prefix_length):  # the very first token has nothing before it
                        before = at + i - 1 if i else begin + prefix_length - 1
                        source.append(r * length + before)
                        target.append(label)
                at += len(branch.ids)
    return Packed(ids, positions, numbers, branches, torch.tensor(source), torch.tensor(target), images)
