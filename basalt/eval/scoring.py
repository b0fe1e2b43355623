"""Scores stored answers again, with no model and no network: the table of benchmarks and what they share."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from basalt.data.readers import DataError
from basalt.eval import captions, mm_vet, mmmu, pope, scienceqa, textvqa, vqa
from basalt.eval.benchmark import (
    ACCURACY,
    MISSING,
    OFFICIAL,
    STRICT,
    Metric,
    Rule,
    Sample,
    Scored,
    Verdict,
    accuracy,
    by_group,
    mean_metric,
)
from basalt.eval.records import MAX_GAP, Gaps, join, read_predictions

Figures = dict[str, dict[str, float]]  # of each way of scoring its metrics, in percent, the main one first
Score = Callable[[Sample, Any], dict[str, Verdict]]  # of one answer, by each way


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark's module does: its files to samples, a file of answers by id, verdicts, metrics.

    `scorer` makes of all samples what scores an answer to one of them.
    """

    read_samples: Callable[[Path, Path | None], list[Sample]]
    scorer: Callable[[Sequence[Sample]], Score]
    read_predictions: Callable[[Path, Sequence[Sample]], Mapping[str, Any]] = read_predictions
    measure: Callable[[Sequence[Scored], str], dict[str, float]] = accuracy
    ways: tuple[str, ...] = (OFFICIAL, STRICT)
    metric: Metric = ACCURACY  # the main one of what is measured


def each(score: Score) -> Callable[[Sequence[Sample]], Score]:
    """The scorer of a benchmark where a score depends on its sample alone."""
    return lambda _: score


BENCHMARKS = {
    "mmmu": Benchmark(mmmu.read_samples, each(mmmu.score)),
    "mm-vet": Benchmark(
        mm_vet.read_samples, each(mm_vet.score), mm_vet.read_predictions, mm_vet.measure, metric=mean_metric("score")
    ),
    "scienceqa": Benchmark(scienceqa.read_samples, each(scienceqa.score), scienceqa.read_predictions),
    "textvqa": Benchmark(textvqa.read_samples, each(textvqa.score), textvqa.read_predictions),
    "pope": Benchmark(pope.read_samples, each(pope.score), measure=pope.measure, metric=pope.F1),
    "captions": Benchmark(
        captions.read_samples,
        captions.scorer,
        measure=captions.measure,
        ways=(captions.COCO,),
        metric=mean_metric("cider"),
    ),
    "vqa": Benchmark(vqa.read_samples, each(vqa.score), ways=(vqa.SOFT, vqa.EXACT, vqa.CONTAINS)),
}


@dataclass(frozen=True)
class Scores:
    """A benchmark's scores: overall and by group, with every sample's verdicts behind them."""

    benchmark: str
    scored: list[Scored]
    gaps: Gaps
    overall: Figures
    groups: dict[str, dict[str, tuple[int, Figures]]]  # kind of group → its name → samples and figures

    def rules(self, way: str) -> Counter[Rule]:
        """How often each rule decided: by their kinds, the rates of fallbacks, failures and refusals."""
        return Counter(one.verdicts[way].rule for one in self.scored)

    def differences(self) -> Counter[tuple[str, str]]:
        """How often which official and strict rule came to different scores."""
        return Counter(one.difference for one in self.scored if one.difference)

    def as_json(self) -> dict[str, Any]:
        """All but the single samples, for a report."""
        return {
            "benchmark": self.benchmark,
            "samples": len(self.scored),
            "missing": list(self.gaps.missing),
            "unknown": list(self.gaps.unknown),
            "scores": self.overall,
            "groups": {
                kind: {name: {"samples": count, "scores": figures} for name, (count, figures) in members.items()}
                for kind, members in self.groups.items()
            },
            "rules": {
                way: [asdict(rule) | {"count": count} for rule, count in self.rules(way).most_common()]
                for way in self.overall
            },
            "differences": [
                {"official": official, "strict": strict, "count": count}
                for (official, strict), count in self.differences().most_common()
            ],
        }


def rescore(
    benchmark: str, data: Path, predictions: Path, *, max_gap: float = MAX_GAP, intersection: bool = False
) -> Scores:
    """Scores a file of answers (MM-Vet: of grades) against a benchmark's published files.

    A sample with no answer counts as wrong, up to `max_gap` of them; `intersection` scores the answered ones alone.

    Raises:
        DataError: a file is not as it should be, samples have no labels, or too much is missing.
    """
    chosen = find(benchmark)
    samples = chosen.read_samples(data, None)
    answers = chosen.read_predictions(predictions, samples)
    return score_answers(benchmark, samples, answers, max_gap=max_gap, intersection=intersection)


def find(benchmark: str) -> Benchmark:
    """
    Raises:
        DataError: there is none of this name.
    """
    if benchmark not in BENCHMARKS:
        raise DataError(f"no benchmark {benchmark!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[benchmark]


def score_answers(
    benchmark: str,
    samples: Sequence[Sample],
    answers: Mapping[str, Any],
    *,
    max_gap: float = MAX_GAP,
    intersection: bool = False,
) -> Scores:
    """`rescore` of samples and answers already read.

    Raises:
        DataError: samples have no labels, or too much is missing.
    """
    chosen = find(benchmark)
    if bare := [sample.id for sample in samples if not sample.gold]:
        raise DataError(f"{len(bare)} of {len(samples)} samples have no label, as {bare[0]!r}: no score is possible")
    pairs, gaps = join(samples, answers, max_gap=max_gap, intersection=intersection)
    wrong = dict.fromkeys(chosen.ways, Verdict(0.0, MISSING))
    score = chosen.scorer([sample for sample, _ in pairs])
    scored = [Scored(sample, answer, wrong if answer is None else score(sample, answer)) for sample, answer in pairs]
    return tally(benchmark, scored, gaps)


def tally(benchmark: str, scored: list[Scored], gaps: Gaps) -> Scores:
    """The scores of verdicts already given."""
    chosen = BENCHMARKS[benchmark]

    def figures(members: Sequence[Scored]) -> Figures:
        return {way: chosen.measure(members, way) for way in chosen.ways}

    kinds = dict.fromkeys(kind for one in scored for kind in one.sample.groups)
    groups = {
        kind: {name: (len(members), figures(members)) for name, members in sorted(by_group(scored, kind).items())}
        for kind in kinds
    }
    return Scores(benchmark, scored, gaps, figures(scored), groups)
