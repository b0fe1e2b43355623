"""Is a new version good enough: not significantly worse than an old one, and not under a threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from basalt.data.readers import DataError
from basalt.eval.results import StoredResult, compare_results
from basalt.eval.uncertainty import Comparison, Interval, holm

ALPHA = 0.05


@dataclass(frozen=True)
class Check:
    """One benchmark's part of the gate. `p` is Holm's, over all comparisons of the gate."""

    result: StoredResult
    score: Interval | None
    problems: tuple[str, ...]
    against: StoredResult | None = None
    comparison: Comparison | None = None
    p: float | None = None


def gate(
    results: Sequence[StoredResult], against: Sequence[StoredResult], minimums: Mapping[str, float]
) -> list[Check]:
    """Compares each result with the one of `against` that is of the same benchmark, data and sight.

    By the benchmarks' first way of scoring, the official one. `minimums` are scores in percent by benchmark.

    Raises:
        DataError: a result has nothing to be checked against, or something to check against is of no result.
    """
    pairs = [(result, _counterpart(result, against)) for result in results]
    for other in against:
        if not any(found is other for _, found in pairs):
            raise DataError(f"{other.directory}: no result is of the same benchmark, data and sight")
    if idle := [str(result.directory) for result, other in pairs if other is None and result.benchmark not in minimums]:
        raise DataError(f"nothing to check {', '.join(idle)} against: give --against, or --minimum")
    if unused := minimums.keys() - {result.benchmark for result in results}:
        raise DataError(f"a minimum for {', '.join(sorted(unused))}, of which there is no result")
    compared = {
        number: compare_results(other, result, result.ways[0])
        for number, (result, other) in enumerate(pairs)
        if other is not None and result.scored
    }
    adjusted = dict(zip(compared, holm([one.p for one in compared.values()]), strict=True))
    return [
        _check(result, other, compared.get(number), adjusted.get(number), minimums)
        for number, (result, other) in enumerate(pairs)
    ]


def _check(
    result: StoredResult,
    other: StoredResult | None,
    comparison: Comparison | None,
    p: float | None,
    minimums: Mapping[str, float],
) -> Check:
    if not result.scored:
        return Check(result, None, (f"{result.scores['status']}: {result.scores['why']}",), other)
    score = result.interval(result.ways[0])
    problems = []
    minimum = minimums.get(result.benchmark)
    if minimum is not None and score.value < minimum:
        problems.append(f"{score.value:.1f} is under {minimum:g}")
    if comparison and p is not None and other and p < ALPHA and comparison.second < comparison.first:
        problems.append(
            f"significantly worse than {other.name}: {comparison.difference.value:+.1f} points, p = {p:.2g}"
        )
    return Check(result, score, tuple(problems), other, comparison, p)


def _counterpart(result: StoredResult, against: Sequence[StoredResult]) -> StoredResult | None:
    of = [
        other
        for other in against
        if (other.benchmark, other.manifest["data"], other.blind)
        == (result.benchmark, result.manifest["data"], result.blind)
    ]
    if len(of) > 1:
        raise DataError(f"{result.directory}: {len(of)} results to compare it with; give one")
    return of[0] if of else None
