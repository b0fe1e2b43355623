"""The rows of a recipe, tokenised and grouped once, and dealt out epoch by epoch, always in the same order."""

import json
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from basalt.data.grouping import LENGTH_STEP, Group, Pass, deal, group_samples, pass_length
from basalt.data.packing import Packed, pack
from basalt.data.preprocess import Tokenizer
from basalt.data.readers import DataSet, is_inside
from basalt.data.scenes import Box
from basalt.data.selection import Counts, Samples, learnable, usable, with_images
from basalt.data.tokenising import tokenised
from basalt.model.precision import dtype_of
from basalt.train import parallel
from basalt.train.features import FeatureCache, LiveFeatures, Tell, cached_features, worth_keeping
from basalt.train.recipe import DataSource, Recipe
from basalt.train.said import log
from basalt.train.stop import Stop, Stopped, never

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One data set, ready: its groups name images of its features, which it may share."""

    groups: list[Group]
    weight: float
    features: FeatureCache | LiveFeatures | None
    boxes: dict[str, list[Box]]  # image name → what stands where; empty where that is not known


@dataclass(frozen=True)
class Batch:
    packed: Packed
    features: Tensor | None  # [images, tokens, tower_dim], bf16, raw


def prepare(
    sources: Sequence[DataSource],
    recipe: Recipe,
    tokenizer: Tokenizer,
    stop: Stop = never,
    tell: Callable[[int, int], None] = lambda seen, of: None,
) -> list[Source]:
    """Reads, tokenises and groups data sets; computes their tower features if they are not cached, once for those
    that are about images of one folder or tar.

    Args:
        tell: is told how many images the tower has seen, of how many, while it runs.

    Raises:
        DataError: too many of the rows of one cannot be used; the message counts why.
        Stopped: `stop` said so while rows were read or features computed.
    """
    readings = [_read(source, recipe, tokenizer, stop) for source in sources]  # all, before the tower is run for hours
    names: dict[_Home, list[str]] = defaultdict(list)
    for reading in readings:
        names[reading.home] += reading.names
    data = {reading.home: reading.data for reading in readings}
    features: dict[_Home, FeatureCache | LiveFeatures | None] = {}
    epochs = recipe.epochs or _epochs(readings, recipe)
    seen, of = 0, sum(len(set(named)) for named in names.values())
    for home, named in names.items():
        shown = sum(reading.source.weight * len(set(reading.names)) for reading in readings if reading.home == home)
        uses = epochs * shown / max(len(set(named)), 1)
        features[home] = _features(named, data[home], recipe, uses, stop, partial(_tell_more, tell, seen, of))
        seen += len(set(named))
    return [_grouped(reading, features[reading.home], recipe) for reading in readings]


_Home = tuple[Path | None, Path | None]  # where images are: the rows' files, if some are inside, and the place beside


@dataclass(frozen=True)
class _Reading:
    """One data set, read and tokenised."""

    source: DataSource
    data: DataSet
    samples: Samples
    counts: Counts
    names: list[str]  # of its images
    home: _Home


def _read(source: DataSource, recipe: Recipe, tokenizer: Tokenizer, stop: Stop) -> _Reading:
    data, counts = DataSet(source.rows, source.images), Counts(source.rows)
    rows = usable(data.rows(source.prompts), counts)
    samples = learnable(_until(stop, tokenised(rows, tokenizer)), recipe.row_length, counts)
    counts.check()
    names = [name for row in rows for name in row.images]
    home = source.rows if any(map(is_inside, names)) else None, source.images
    return _Reading(source, data, samples, counts, names, home)


def _epochs(readings: list[_Reading], recipe: Recipe) -> float:
    """About how often the recipe's steps go through the data: an image's tokens are dealt once for all its rows."""
    tokens = 0.0
    for reading in readings:
        shown = len(set(reading.names)) - len(reading.names)
        tokens += reading.source.weight * sum(len(sample.ids) for _, sample in reading.samples)
        tokens += reading.source.weight * shown * recipe.tower.tokens
    dealt = (recipe.steps or 0) * recipe.passes_per_step * recipe.rows_per_pass * recipe.row_length
    return dealt / max(tokens, 1)


def _until(stop: Stop, items: Iterable[T]) -> Iterator[T]:
    for number, item in enumerate(items):
        if number % 1024 == 1023 and stop():
            raise Stopped("stopped while rows were read: started again, it reads them again")
        yield item


def _tell_more(tell: Callable[[int, int], None], before: int, of: int, seen: int) -> None:
    tell(before + seen, of)


def _features(
    names: list[str], data: DataSet, recipe: Recipe, uses: float, stop: Stop, tell: Tell
) -> FeatureCache | LiveFeatures | None:
    if not names:
        return None
    dtype = dtype_of(recipe.dtype, parallel.device())
    if _kept(names, data, recipe, uses, dtype):
        return cached_features(recipe.tower, data, names, recipe.features, dtype, stop, tell)
    return LiveFeatures(recipe.tower, data, names, dtype)


def _kept(names: list[str], data: DataSet, recipe: Recipe, uses: float, dtype: torch.dtype) -> bool:
    """Whether features are kept. Of processes that train together the first decides.

    Each for itself could find another disk, or another's cache begun: then one would know of broken images that others
    do not, and they would deal other batches.
    """
    if recipe.grounding is not None:
        return True  # it asks for each again and again
    if recipe.keep_features is not None:
        return recipe.keep_features
    leading = parallel.rank_and_world()[0] == 0
    decided = leading and worth_keeping(recipe.tower, data, names, recipe.features, dtype, uses)
    return parallel.added_up([float(decided)]) == [1.0]


def _grouped(reading: _Reading, features: FeatureCache | LiveFeatures | None, recipe: Recipe) -> Source:
    source, counts = reading.source, reading.counts
    samples = with_images(reading.samples, {} if features is None else features.broken, counts)
    counts.check()
    chosen = ((row.images, sample) for row, sample in samples)
    groups = group_samples(chosen, recipe.row_length, recipe.image_token_id)
    log.log(
        logging.WARNING if counts.dropped else logging.INFO,
        f"{source.rows.name}: {counts.rows} rows in {len(groups)} groups; {counts}",
    )
    boxes = {} if source.boxes is None else json.loads(source.boxes.read_text())
    return Source(groups, source.weight, features, boxes)


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
        self._passes: list[Pass] = []
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
        return Dealt(
            [self.batch(part) for rows in passes[rank::world] for part in self._parts(rows)],
            sum(group.supervised() for rows in passes for row in rows for group in row),
        )

    def _parts(self, rows: Pass) -> list[Pass]:
        """What of a pass is run through the model at once."""
        size = -(-len(rows) // self.recipe.split)
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        if self.recipe.shard:  # all processes run as many, at the same time
            parts += [[[]]] * (self.recipe.split - len(parts))
        return parts

    def batch(self, rows: Pass) -> Batch:
        """Rows of groups as tensors, with the features of their images in order."""
        shown = self._shown([group for row in rows for group in row])
        there = [[group for group in row if len(shown[id(group)]) == len(group.images)] for row in rows]
        length = pass_length(rows, self.recipe.row_length) or LENGTH_STEP  # of an empty row
        packed = pack(there, length, self.pad_id, self.recipe.image_token_id)
        features = [feature for row in there for group in row for feature in shown[id(group)]]
        return Batch(packed, torch.stack(features) if features else None)

    def features(self, group: Group) -> list[Tensor]:
        """Of each image of a group, `[tokens, tower_dim]`."""
        return self._shown([group])[id(group)]

    def _shown(self, groups: list[Group]) -> dict[int, list[Tensor]]:
        """The features of each group's images; fewer than it has images where one turns out to be broken."""
        of: dict[int, dict[str, Tensor]] = {}
        for source in self.sources:
            mine = [name for group in groups if self._home[id(group)] is source for name in group.images]
            of[id(source)] = source.features.of(list(dict.fromkeys(mine))) if source.features and mine else {}
        shown = {}
        for group in groups:
            found = of[id(self._home[id(group)])]
            shown[id(group)] = [found[name] for name in group.images if name in found]
        return shown

    def steps_per_epoch(self) -> int:
        """By the packing of the first epoch; that of others differs by little."""
        if not self._passes:
            self._passes, self._epoch = self._deal(0), 0
            self._per_epoch = max(len(self._passes) // self.recipe.passes_per_step, 1)
        return self._per_epoch

    def _deal(self, epoch: int) -> list[Pass]:
        rng = random.Random(f"{self.recipe.seed}/{epoch}")
        sources = [(source.groups, source.weight) for source in self.sources]
        return deal(sources, self.recipe.row_length, self.recipe.rows_per_pass, rng)


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
