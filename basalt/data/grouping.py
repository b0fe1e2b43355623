"""Grouping: many conversations in one row, those about the same images sharing them.

Conversations about the same images often begin with the same tokens, most of them visual. A `Group` holds that
common beginning once, as a prefix, and each conversation's rest as a branch that sees the prefix and
itself. Rows of groups are filled first-fit. All of it is lists and numbers: no torch, so that data can be checked
where nothing is trained.
"""

import hashlib
import random
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from basalt.data.preprocess import IGNORE, Sample

LENGTH_STEP = 32  # tokens
WINDOW = 16  # passes whose rows are sorted by length together


@dataclass
class Group:
    """Conversations with a common unsupervised beginning. `images` name what its visual tokens show, in order."""

    images: tuple[str, ...]
    prefix: Sequence[int]
    branches: list[Sample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)

    def supervised(self) -> int:
        """How many tokens are learned: all that have a label, but for one that nothing stands before."""
        return sum(
            label != IGNORE and bool(i or self.prefix)
            for branch in self.branches
            for i, label in enumerate(branch.labels)
        )


Pass = list[list[Group]]  # rows that are run through the model together


def group_samples(
    samples: Iterable[tuple[tuple[str, ...], Sample]], max_length: int, image_token_id: int
) -> list[Group]:
    """Groups conversations that begin alike, images included; one that outgrows `max_length` is continued in another.

    Args:
        samples: the names of its images in order, and the conversation: at most `max_length` tokens, some of them
            learned. Nothing is cut: a cut could fall inside an image or leave nothing to learn.
    """
    alike: dict[tuple[tuple[str, ...], bytes], list[Sample]] = defaultdict(list)
    groups: list[Group] = []
    for images, sample in samples:
        seen = _to_last_image(sample, image_token_id)
        if seen is None:
            groups.append(Group(images, [], [sample]))
        else:
            alike[images, seen].append(sample)
    for (images, _), members in alike.items():
        groups += _share_prefix(images, members, max_length)
    return groups


def _to_last_image(sample: Sample, image_token_id: int) -> bytes | None:
    """A digest of the tokens up to the last visual one; None where there is none, or something is learned before it."""
    last = max((i for i, token in enumerate(sample.ids) if token == image_token_id), default=-1)
    if last < 0 or any(label != IGNORE for label in sample.labels[: last + 1]):
        return None
    return hashlib.sha256(array("i", sample.ids[: last + 1]).tobytes()).digest()


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


def deal(
    sources: list[tuple[list[Group], float]], row_length: int, rows_per_pass: int, rng: random.Random
) -> list[Pass]:
    """The passes of an epoch: rows of like lengths together, so that little is padded, in random order.

    Args:
        sources: the groups of each data set, and how often each is seen in an epoch.
    """
    chosen: list[Group] = []
    for groups, weight in sources:
        whole, rest = divmod(weight, 1)
        chosen += groups * int(whole)
        chosen += rng.sample(groups, round(rest * len(groups)))
    rows = fill_rows(chosen, row_length, rng)
    passes: list[Pass] = []
    for start in range(0, len(rows), WINDOW * rows_per_pass):
        window = sorted(rows[start : start + WINDOW * rows_per_pass], key=_length)
        passes += [window[at : at + rows_per_pass] for at in range(0, len(window), rows_per_pass)]
    rng.shuffle(passes)
    return passes


def pass_length(rows: Pass, row_length: int) -> int:
    """As long as the longest row, rounded up: few lengths, so that what is compiled or allocated for one fits again."""
    return min(-(-max(map(_length, rows)) // LENGTH_STEP) * LENGTH_STEP, row_length)


def _length(row: list[Group]) -> int:
    return sum(map(len, row))
