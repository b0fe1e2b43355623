"""Packing: many conversations in one row, each seeing only itself, images shared.

Conversations about the same images often begin with the same tokens, most of them visual. A `Group` holds that
common beginning once, as a prefix, and each conversation's rest as a branch that sees the prefix and
itself. Positions go on from the prefix, so every branch computes what it would alone, while the image is
run through the LM once for all its questions. Rows of groups are filled first-fit.
"""

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from basalt.data.preprocess import IGNORE, Sample

PREFIX = 0  # branch number of a group's prefix


@dataclass
class Group:
    """Conversations with a common unsupervised beginning. `images` name what its visual tokens show, in order."""

    images: tuple[str, ...]
    prefix: list[int]
    branches: list[Sample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)


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


def group_samples(
    samples: Iterable[tuple[tuple[str, ...], Sample]], max_length: int, image_token_id: int
) -> tuple[list[Group], int]:
    """Groups conversations that begin alike, images included; one that outgrows `max_length` is continued in another.

    Args:
        samples: the names of its images in order, and the conversation.

    Returns:
        The groups, and how many samples were dropped because they alone are longer than `max_length`.
        Nothing is cut: a cut could fall inside an image or leave nothing to learn.
    """
    alike: dict[tuple[tuple[str, ...], tuple[int, ...]], list[Sample]] = defaultdict(list)
    groups: list[Group] = []
    dropped = 0
    for images, sample in samples:
        seen = _to_last_image(sample, image_token_id)
        if len(sample.ids) > max_length:
            dropped += 1
        elif seen is None:
            groups.append(Group(images, [], [sample]))
        else:
            alike[images, seen].append(sample)
    for (images, _), members in alike.items():
        groups += _share_prefix(images, members, max_length)
    return groups, dropped


def _to_last_image(sample: Sample, image_token_id: int) -> tuple[int, ...] | None:
    """The tokens up to the last visual one; None where there is none, or something is learned before it."""
    last = max((i for i, token in enumerate(sample.ids) if token == image_token_id), default=-1)
    if last < 0 or any(label != IGNORE for label in sample.labels[: last + 1]):
        return None
    return tuple(sample.ids[: last + 1])


def _share_prefix(images: tuple[str, ...], members: list[Sample], max_length: int) -> list[Group]:
    prefix = members[0].ids[: next(i for i, label in enumerate(members[0].labels) if label != IGNORE)]
    for member in members[1:]:
        same = 0
        while (
            same < len(prefix)
            and same < len(member.ids)
            and prefix[same] == member.ids[same]
            and member.labels[same] == IGNORE
        ):
            same += 1
        prefix = prefix[:same]
    groups = [Group(images, prefix)]
    for member in members:
        branch = Sample(member.ids[len(prefix) :], member.labels[len(prefix) :])
        if len(groups[-1]) + len(branch.ids) > max_length:
            groups.append(Group(images, prefix))
        groups[-1].branches.append(branch)
    return groups


def fill_rows(groups: list[Group], length: int, rng: random.Random, *, open_rows: int = 64) -> list[list[Group]]:
    """Shuffles the groups into rows of at most `length` tokens, first-fit among the rows still open."""
    order = list(groups)
    rng.shuffle(order)
    rows: list[list[Group]] = []
    open_: list[tuple[int, list[Group]]] = []  # (free, row)
    for group in order:
        for number, (free, row) in enumerate(open_):
            if len(group) <= free:
                row.append(group)
                open_[number] = (free - len(group), row)
                break
        else:
            row = [group]
            rows.append(row)
            open_.append((length - len(group), row))
            if len(open_) > open_rows:
                open_.remove(min(open_, key=lambda entry: entry[0]))
    rng.shuffle(rows)
    return rows


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
