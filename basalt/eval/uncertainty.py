"""How sure a score is: bootstrap intervals of the metric itself, and paired tests of two versions.

Drawn again are clusters (pictures), not questions: answers about one picture are right or wrong together. Intervals are
BCa (Efron 1987, "Better bootstrap confidence intervals"), which follow a skewed metric; draws are seeded, so that the
same verdicts have the same interval.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from basalt.eval.benchmark import Metric, Scored

DRAWS = 10_000
LEVEL = 0.95
SEED = 2024
_CELLS = 4_000_000  # drawn at a time: 32 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and where it lies with 95 % confidence, in its own unit (of scores: percent)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two versions on the same samples: `difference` is the second's score less the first's, in points.

    `p` is two-sided: how often a difference as large comes of chance alone.
    """

    samples: int
    first: float
    second: float
    difference: Interval
    p: float
    test: str


def interval(scored: Sequence[Scored], way: str, metric: Metric, *, draws: int = DRAWS) -> Interval:
    """The metric and its interval.

    Raises:
        ValueError: there are no samples.
    """
    if not scored:
        raise ValueError("no samples: nothing is known")
    sums = _by_cluster(metric.terms(scored, way), scored)
    return _interval(sums, metric.of, _drawn(sums, metric.of, draws), lowest=0)


def compare(
    first: Sequence[Scored], second: Sequence[Scored], way: str, metric: Metric, *, draws: int = DRAWS
) -> Comparison:
    """A paired test of two versions' verdicts on the same samples, in any order.

    Where scores are right or wrong and no samples share a cluster it is McNemar's exact test, on the samples where the
    two differ; else the bootstrap of the difference, both versions' verdicts on a cluster drawn together.

    Raises:
        ValueError: the two are not about the same samples, or there are none.
    """
    others = {one.sample.id: one for one in second}
    if not first or len(others) != len(second) or {one.sample.id for one in first} != others.keys():
        raise ValueError("a paired test needs both versions' verdicts on the same samples")
    second = [others[one.sample.id] for one in first]
    ours, theirs = metric.terms(first, way), metric.terms(second, way)
    width = ours.shape[1]
    sums = _by_cluster(np.hstack([ours, theirs]), first)

    def difference(totals: Floats) -> Floats:
        return metric.of(totals[..., width:]) - metric.of(totals[..., :width])

    drawn = _drawn(sums, difference, draws)
    found = _interval(sums, difference, drawn, lowest=-100)
    scores = [(one.verdicts[way].score, other.verdicts[way].score) for one, other in zip(first, second, strict=True)]
    if metric.mean and len(sums) == len(first) and all(score in (0, 1) for pair in scores for score in pair):
        test = "McNemar, exact"
        p = mcnemar(sum(a > b for a, b in scores), sum(a < b for a, b in scores))
    else:
        test = "paired bootstrap"
        p = min(1.0, 2 * (1 + min(np.sum(drawn <= 0), np.sum(drawn >= 0))) / (1 + len(drawn)))
    before, after = (float(metric.of(terms.sum(0))) for terms in (ours, theirs))
    return Comparison(len(first), before, after, found, float(p), test)


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p of as many samples right before alone (`lost`) and now alone (`won`)."""
    both = lost + won
    tail = sum(math.comb(both, count) for count in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**both)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of several tests, adjusted so that all of them together err as rarely as one (Holm 1979)."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def _interval(sums: Floats, of: Callable[[Floats], Floats], drawn: Floats, *, lowest: float) -> Interval:
    value, draws = float(of(sums.sum(0))), len(drawn)
    if drawn.min() == drawn.max():  # all right, all wrong, or no difference: the exact binomial bound over the clusters
        reach = 100 * (1 - ((1 - LEVEL) / 2) ** (1 / len(sums)))
        return Interval(value, max(value - reach, lowest), min(value + reach, 100.0))
    normal = NormalDist()
    below = np.clip((np.sum(drawn < value) + np.sum(drawn == value) / 2) / draws, 1 / draws, 1 - 1 / draws)
    bias = normal.inv_cdf(float(below))
    left_out = of(sums.sum(0) - sums)  # the metric without each cluster
    gaps = left_out.mean() - left_out
    spread = float((gaps**2).sum())
    acceleration = float((gaps**3).sum()) / (6 * spread**1.5) if spread else 0.0

    def bound(share: float) -> float:
        at = bias + normal.inv_cdf(share)
        return float(np.quantile(drawn, normal.cdf(bias + at / max(1 - acceleration * at, 1e-9))))

    return Interval(value, bound((1 - LEVEL) / 2), bound((1 + LEVEL) / 2))


def _drawn(sums: Floats, of: Callable[[Floats], Floats], draws: int) -> Floats:
    """The metric of as many draws of clusters, with replacement. `sums` is [clusters, terms]."""
    clusters = len(sums)
    random = np.random.default_rng(SEED)
    at_a_time = max(1, _CELLS // clusters)
    found = []
    for start in range(0, draws, at_a_time):
        rows = min(at_a_time, draws - start)
        chosen = random.integers(0, clusters, (rows, clusters)) + clusters * np.arange(rows)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=rows * clusters).reshape(rows, clusters)
        found.append(of(weights @ sums))
    return np.concatenate(found)


def _by_cluster(terms: Floats, scored: Sequence[Scored]) -> Floats:
    """Terms summed over each cluster; a sample with none is its own."""
    names = [one.sample.cluster or f"\0{one.sample.id}" for one in scored]
    _, numbers = np.unique(names, return_inverse=True)
    sums = np.zeros((int(numbers.max()) + 1, terms.shape[1]))
    np.add.at(sums, numbers, terms)
    return sums
