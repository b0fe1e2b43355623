"""Packing: rows of groups laid out as tensors, in which each conversation sees only itself and its group's beginning.

Positions go on from the prefix, so every branch computes what it would alone, while the image is run through the
LM once for all its questions.
"""

from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from basalt.data.grouping import Group
from basalt.data.preprocess import IGNORE

PREFIX = 0  # branch number of a group's prefix


@dataclass(frozen=True)
class Segments:
    """A batch's rows, one after the other, cut where attention begins anew.

    A segment is causal in itself. A group's prefix and first branch are one; each further branch is one that sees the
    prefix too; so is a row's padding, that every position belongs to one.

    Attributes:
        lengths: of the segments, R·T together.
        prefixes: which segment begins with the prefix that each one sees besides, and the length of it; 0 for none.
        keys: `[K]`, flat positions of what each segment sees, its prefix first.
        query_ends, key_ends: `[segments + 1]`, where each one's queries and `keys` end, from 0.
        learned: flat positions whose hidden states predict something, ascending.
        learned_at: the same, counted from where their segment begins.
        learned_lengths: how many there are in each segment.
    """

    lengths: list[int]
    prefixes: list[tuple[int, int]]
    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_keys: int
    learned: Tensor
    learned_at: Tensor
    learned_lengths: list[int]

    @staticmethod
    def of(lengths: list[int], prefixes: list[tuple[int, int]], learned: Tensor) -> "Segments":
        begins = [0, *accumulate(lengths)]
        seen = [length + prefix for length, (_, prefix) in zip(lengths, prefixes, strict=True)]
        keys = [torch.empty(0, dtype=torch.long)]
        for number, (first, prefix) in enumerate(prefixes):
            if prefix:
                keys.append(torch.arange(begins[first], begins[first] + prefix))
            keys.append(torch.arange(begins[number], begins[number + 1]))
        query_ends = torch.tensor(begins, dtype=torch.int32)
        home = torch.searchsorted(query_ends, learned, right=True) - 1
        return Segments(
            lengths=lengths,
            prefixes=prefixes,
            keys=torch.cat(keys),
            query_ends=query_ends,
            key_ends=torch.tensor([0, *accumulate(seen)], dtype=torch.int32),
            longest_query=max(lengths, default=0),
            longest_keys=max(seen, default=0),
            learned=learned,
            learned_at=learned - query_ends[home],
            learned_lengths=torch.bincount(home, minlength=len(lengths)).tolist(),
        )

    def to(self, device: torch.device) -> "Segments":
        return replace(self, **_tensors_there(self, device))


@dataclass(frozen=True)
class Packed:
    """A batch of rows, `[R, T]` each.

    `source` and `target` list what is learned: the hidden state at flat position `segments.learned[source[k]]`
    predicts token `target[k]`. A prefix's last position may predict the first token of several branches.
    """

    ids: Tensor
    positions: Tensor
    groups: Tensor  # group number, -1 is padding
    branches: Tensor
    source: Tensor  # [K]
    target: Tensor  # [K]
    images: list[str]  # in the order of their visual tokens
    segments: Segments
    image_tokens: int | None  # how many; None where it was not counted

    def to(self, device: torch.device) -> "Packed":
        return replace(self, segments=self.segments.to(device), **_tensors_there(self, device))

    def attention_mask(self) -> Tensor:
        """Boolean `[R, 1, T, T]`: causal, within a group, and there to the prefix or the own branch."""
        rows, length = self.ids.shape
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        same_group = self.groups[:, :, None] == self.groups[:, None, :]
        visible = (self.branches[:, None, :] == PREFIX) | (self.branches[:, :, None] == self.branches[:, None, :])
        return (causal & same_group & visible)[:, None].expand(rows, 1, length, length)


def _tensors_there(holder: Segments | Packed, device: torch.device) -> dict[str, Any]:
    named = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: value.to(device, non_blocking=True) for name, value in named.items() if isinstance(value, Tensor)}


def pack(rows: list[list[Group]], length: int, pad_id: int, image_token_id: int | None = None) -> Packed:
    """Lays rows of groups out as tensors of `[len(rows), length]`.

    Args:
        image_token_id: is counted here, on the CPU, so that the model need not wait for a device to do so.
    """
    shape = (len(rows), length)
    ids = torch.full(shape, pad_id)
    positions, branches = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    numbers = torch.full(shape, -1)
    source: list[int] = []
    target: list[int] = []
    images: list[str] = []
    lengths: list[int] = []
    prefixes: list[tuple[int, int]] = []
    for r, row in enumerate(rows):
        at = 0
        for number, group in enumerate(row):
            images += group.images
            begin, prefix_length = at, len(group.prefix)
            end = begin + len(group)
            ids[r, begin:end] = torch.tensor([*group.prefix, *(token for b in group.branches for token in b.ids)])
            numbers[r, begin:end] = number
            positions[r, begin : begin + prefix_length] = torch.arange(prefix_length)
            at = begin + prefix_length
            first = len(lengths)
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
                if len(lengths) == first:
                    lengths.append(at - begin)
                    prefixes.append((first, 0))
                else:
                    lengths.append(len(branch.ids))
                    prefixes.append((first, prefix_length))
        if at < length:
            prefixes.append((len(lengths), 0))
            lengths.append(length - at)
    learned, into = torch.tensor(source, dtype=torch.long).unique(return_inverse=True)
    segments = Segments.of(lengths, prefixes, learned)
    counted = None if image_token_id is None else int((ids == image_token_id).sum())
    wanted = torch.tensor(target, dtype=torch.long)  # also where there is none
    return Packed(ids, positions, numbers, branches, into, wanted, images, segments, counted)
