"""Runs read again from their directories, for reports and gates, and two of them compared."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basalt.data.readers import DataError
from basalt.eval.benchmark import MISSING, Rule, Sample, Scored, Verdict
from basalt.eval.records import MAX_GAP
from basalt.eval.run import ANSWERS, MANIFEST, RUN, SCORES, VERDICTS
from basalt.eval.scoring import Benchmark, find
from basalt.eval.uncertainty import Comparison, Interval, compare, interval


@dataclass(frozen=True)
class StoredResult:
    """A run's directory. `scored` is empty where there is no score; its samples have neither prompt nor pictures."""

    directory: Path
    manifest: dict[str, Any]
    run: dict[str, Any]
    scores: dict[str, Any]
    scored: list[Scored]

    @property
    def benchmark(self) -> str:
        return self.manifest["benchmark"]

    @property
    def blind(self) -> bool:
        return self.manifest["blind"]

    @property
    def whole(self) -> int:
        """How many samples the data has, of which a run may have been limited to some."""
        return self.run["whole"]

    @property
    def name(self) -> str:
        """Who answered: the model, with the first digits of its version where it has one."""
        model, version = self.manifest["model"]["model"], self.manifest["model"]["version"]
        shown = model if not version or "@" in model else f"{model}@{version.removeprefix('sha256:')[:8]}"
        return f"{shown}, blind" if self.blind else shown

    @property
    def chosen(self) -> Benchmark:
        return find(self.benchmark)

    @property
    def ways(self) -> tuple[str, ...]:
        return self.chosen.ways

    def interval(self, way: str, scored: Sequence[Scored] | None = None) -> Interval:
        """The main metric of all samples, or of some, with its interval."""
        return interval(self.scored if scored is None else scored, way, self.chosen.metric)


def load_result(directory: Path) -> StoredResult:
    """
    Raises:
        DataError: the directory holds no finished run, or its verdicts are of another form.
    """
    try:
        manifest, run, scores = (json.loads((directory / name).read_text()) for name in (MANIFEST, RUN, SCORES))
        kinds = {rule["name"]: rule["kind"] for rules in scores.get("rules", {}).values() for rule in rules}
        answers = {one["id"]: one["prediction"] for one in _lines(directory / ANSWERS)}
        scored = [_scored(record, answers, kinds) for record in _lines(directory / VERDICTS)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory} is not the directory of a run, or of an older form: {error!r}") from error
    return StoredResult(directory, manifest, run, scores, scored)


def compare_results(first: StoredResult, second: StoredResult, way: str) -> Comparison:
    """A paired test of the second against the first, on the samples both were scored on.

    Raises:
        DataError: they are not of the same benchmark and data, one has no score, or they share too few samples.
    """
    ours, theirs = shared(first, second)
    return compare(ours, theirs, way, first.chosen.metric)


def shared(first: StoredResult, second: StoredResult) -> tuple[list[Scored], list[Scored]]:
    """What both were scored on, in the same order.

    Raises:
        DataError: as for `compare_results`.
    """
    for result in (first, second):
        if not result.scored:
            raise DataError(f"{result.directory} has no score: {result.scores['why'] or result.scores['status']}")
    if first.manifest["data"] != second.manifest["data"] or first.benchmark != second.benchmark:
        raise DataError(f"{first.directory} and {second.directory} are not runs of the same benchmark and data")
    others = {one.sample.id: one for one in second.scored}
    common = [one for one in first.scored if one.sample.id in others]
    largest = max(len(first.scored), len(second.scored))
    if len(common) < (1 - MAX_GAP) * largest:
        raise DataError(
            f"{first.directory} and {second.directory} share {len(common)} of {largest} samples: "
            "a comparison would mislead"
        )
    return common, [others[one.sample.id] for one in common]


def _scored(record: dict[str, Any], answers: dict[str, str], kinds: dict[str, Any]) -> Scored:
    groups = {kind: tuple(names) for kind, names in record["groups"].items()}
    sample = Sample(record["id"], "", tuple(record["gold"]), groups=groups, cluster=record["cluster"])
    verdicts = {
        way: Verdict(one["score"], Rule(one["rule"], kinds.get(one["rule"], MISSING.kind), ""), one["answer"])
        for way, one in record["verdicts"].items()
    }
    return Scored(sample, answers.get(sample.id), verdicts)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
