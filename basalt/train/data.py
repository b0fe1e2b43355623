"""The rows of a recipe, tokenised and grouped once, and dealt out epoch by epoch, always in the same order."""

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from basalt.data.packing import Group, Packed, fill_rows, group_samples, pack
from basalt.data.preprocess import IGNORE, Tokenizer
from basalt.data.readers import DataError, ImageSource, read_rows
from basalt.data.scenes import Box
from basalt.train import parallel
from basalt.train.features import FeatureCache, cached_features
from basalt.train.recipe import DataSource, Recipe

MAX_DROPPED = 0.05  # a data set that loses more than this share of its rows is not what its owner thinks it is

T = TypeVar("T")

LENGTH_STEP = 32  # tokens
WINDOW = 16  # passes whose rows are sorted by length together


@dataclass(frozen=True)
class Source:
    """One data set, ready: its groups name images of its cache."""

    groups: list[Group]
    weight: float
    features: FeatureCache | None
    boxes: dict[str, list[Box]]  # image name → what stands where; empty where that is not known


@dataclass(frozen=True)
class Batch:
    packed: Packed
    features: Tensor | None  # [images, tokens, tower_dim], bf16, raw


def prepare(source: DataSource, recipe: Recipe, tokenizer: Tokenizer) -> Source:
    """Reads, tokenises and groups one data set; computes its tower features if they are not cached.

    Raises:
        DataError: more than `MAX_DROPPED` of the rows cannot be used; the message counts why.
    """
    rows = list(read_rows(source.rows, source.prompts))
    cache = None
    names = [name for row in rows for name in row.images]
    if names:
        if source.images is None:
            raise DataError(f"{source.rows} has rows with images: name their folder or tar as `images`")
        cache = cached_features(recipe.tower, ImageSource(source.images), names, recipe.features)
    usable = [row for row in rows if cache is None or all(name in cache for name in row.images)]
    samples = ((row.images, tokenizer.sample(row.messages)) for row in usable)
    groups, too_long = group_samples(samples, recipe.row_length, recipe.image_token_id)
    broken = len(rows) - len(usable)
    if broken + too_long > MAX_DROPPED * len(rows):
        raise DataError(
            f"{source.rows}: of {len(rows)} rows, {broken} have an image that cannot be decoded and {too_long} are"
            f" longer than row_length = {recipe.row_length} tokens; at most {MAX_DROPPED:.0%} may be dropped"
        )
    print(f"{source.rows.name}: {len(rows)} rows in {len(groups)} groups; dropped {broken} broken, {too_long} too long")
    boxes = {} if source.boxes is None else json.loads(source.boxes.read_text())
    return Source(groups, source.weight, cache, boxes)


@dataclass(frozen=True)
class Dealt:
    """This process's batches of one step, and how many tokens the batches of all processes teach."""

    batches: list[Batch]
    supervised: int


class Dealer:
    """Deals the batches of a run: step `n` is the same batch whenever and wherever it is asked for.

    Where several processes train together, each gets its share of a step's passes.
    """

    def __init__(self, sources: list[Source], recipe: Recipe, pad_id: int) -> None:
        self.sources = sources
        self.recipe = recipe
        self.pad_id = pad_id
        self._epoch = -1
        self._passes: list[list[list[Group]]] = []
        self._home = {id(group): source for source in sources for group in source.groups}

    def step(self, number: int) -> Dealt:
        """Step `number`, counted from 0."""
        per_epoch = self.steps_per_epoch()
        epoch, offset = divmod(number, per_epoch)
        if epoch != self._epoch:
            self._passes, self._epoch = self._deal(epoch), epoch
        size = self.recipe.passes_per_step
        # Packing varies a little from epoch to epoch, and a small data set has fewer passes than a step.
        begin = min(offset * size, max(len(self._passes) - size, 0))
        passes = [self._passes[(begin + at) % len(self._passes)] for at in range(size)]
        rank, world = parallel.rank_and_world()
        return Dealt([self.batch(rows) for rows in passes[rank::world]], sum(map(_supervised, passes)))

    def batch(self, rows: list[list[Group]]) -> Batch:
        """Rows of groups as tensors, with the features of their images in order.

        As long as the longest row, rounded up: few lengths, so that what is compiled or allocated for one fits again.
        """
        longest = max(_length(row) for row in rows)
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self.recipe.row_length)
        packed = pack(rows, length, self.pad_id)
        features = [feature for row in rows for group in row for feature in self.features(group)]
        return Batch(packed, torch.stack(features) if features else None)

    def features(self, group: Group) -> list[Tensor]:
        """Of each image of a group, `[tokens, tower_dim]`."""
        cache = self._home[id(group)].features
        return [] if cache is None else [cache[name] for name in group.images]

    def steps_per_epoch(self) -> int:
        """By the packing of the first epoch; that of others differs by little."""
        if not self._passes:
            self._passes, self._epoch = self._deal(0), 0
            self._per_epoch = max(len(self._passes) // self.recipe.passes_per_step, 1)
        return self._per_epoch

    def _deal(self, epoch: int) -> list[list[list[Group]]]:
        """The passes of an epoch: rows of like lengths together, so that little is padded, in random order."""
        rng = random.Random(f"{self.recipe.seed}/{epoch}")
        chosen: list[Group] = []
        for source in self.sources:
            whole, rest = divmod(source.weight, 1)
            chosen += source.groups * int(whole)
            chosen += rng.sample(source.groups, round(rest * len(source.groups)))
        rows = fill_rows(chosen, self.recipe.row_length, rng)
        size = self.recipe.rows_per_pass
        passes: list[list[list[Group]]] = []
        for start in range(0, len(rows), WINDOW * size):
            window = sorted(rows[start : start + WINDOW * size], key=_length)
            passes += [window[at : at + size] for at in range(0, len(window), size)]
        rng.shuffle(passes)
        return passes


def _supervised(rows: list[list[Group]]) -> int:
    """How many tokens rows of groups teach, counted as `pack` lays them out."""
    return sum(
        label != IGNORE and bool(i or group.prefix)
        for row in rows
        for group in row
        for branch in group.branches
        for i, label in enumerate(branch.labels)
    )


def prefetched(make: Callable[[int], T], numbers: range) -> Iterator[T]:
    """`make(number)` for each number; while the caller uses one, a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        ahead = [thread.submit(make, number) for number in numbers[:1]]
        for following in numbers[1:]:
            made = ahead.pop().result()
            ahead.append(thread.submit(make, following))
            yield made
        for last in ahead:
            yield last.result()


def _length(row: list[Group]) -> int:
    return sum(map(len, row))
