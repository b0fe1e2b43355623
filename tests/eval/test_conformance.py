"""Scores LLaVA-1.5-13B's own published answers: the figures must be those that were published, to the digit.

Published figures: LLaVA's MODEL_ZOO (POPE, ScienceQA, TextVQA, MM-Vet), MM-Vet's result tables, and for MMMU what its
official parser says of the raw outputs. The files are not in this repository: BASALT_DATA names the folder that has
them in `golden`, with MMMU's own in `mmmu`.
"""

import ast
import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest

from basalt.eval.benchmark import ACCURACY, OFFICIAL
from basalt.eval.conformance import GOLDEN, check, read_record
from basalt.eval.mm_vet import run_scores
from basalt.eval.mmmu import DRAWN
from basalt.eval.pope import F1
from basalt.eval.scoring import Scores, rescore
from basalt.eval.uncertainty import interval

DATA = Path(os.environ.get("BASALT_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
FILES = DATA / "golden"

pytestmark = pytest.mark.skipif(
    not FILES.is_dir(), reason=f"the published answers are not here: no folder {FILES} (set BASALT_DATA)"
)


def official(scores: Scores, metric: str = "accuracy") -> float:
    return scores.overall[OFFICIAL][metric]


def groups(scores: Scores, kind: str, metric: str) -> dict[str, float]:
    return {name: round(figures[OFFICIAL][metric], 1) for name, (_, figures) in scores.groups[kind].items()}


@pytest.mark.parametrize("benchmark", GOLDEN)
def test_every_published_figure_is_met_to_the_digit_by_the_code_as_recorded(benchmark: str) -> None:
    """Else: `basalt eval conformance --data DATA`, which writes the record that reports show."""
    found = check(benchmark, DATA)
    assert found.found == found.expected
    assert read_record(benchmark) == found


def test_pope() -> None:
    scores = rescore("pope", FILES / "pope", FILES / "pope/answers/llava-v1.5-13b.jsonl")
    assert {name: count for name, (count, _) in scores.groups["category"].items()} == {
        "random": 2910, "popular": 3000, "adversarial": 3000,
    }  # fmt: skip
    assert groups(scores, "category", "f1") == {"random": 87.1, "popular": 86.2, "adversarial": 84.5}
    assert round(official(scores, "f1"), 1) == 85.9
    assert not scores.gaps.missing and not scores.gaps.unknown


def test_scienceqa() -> None:
    scores = rescore(
        "scienceqa",
        FILES / "scienceqa/llava_test_CQM-A.json",
        FILES / "scienceqa/answers/llava-v1.5-13b_output.jsonl",
    )
    samples, figures = scores.groups["context"]["image"]
    assert (len(scores.scored), samples) == (4241, 2017)
    assert round(figures[OFFICIAL]["accuracy"], 2) == 71.64
    assert round(official(scores), 2) == 74.39


def test_mm_vet() -> None:
    results = FILES / "mm-vet/results"
    scores = rescore("mm-vet", FILES / "mm-vet/mm-vet.json", results / "llava-v1.5-13b_gpt-4-grade-3runs.json")
    overall = table(results / "llava-v1.5-13b_gpt-4-cap-score-3runs.csv")
    names = {"rec", "ocr", "know", "gen", "spat", "math"}
    assert groups(scores, "capability", "score") == {name: float(overall[name]) for name in names}
    assert round(official(scores, "score"), 1) == float(overall["total"]) == 36.3
    assert round(official(scores, "std"), 1) == float(overall["std"]) == 0.2
    assert [round(run, 1) for run in run_scores(scores.scored)] == ast.literal_eval(overall["runs"])
    integrations = table(results / "llava-v1.5-13b_gpt-4-cap-int-score-3runs.csv")
    published = {
        frozenset(name.split("_")): float(value)
        for name, value in integrations.items()
        if name not in ("", "total", "std", "runs")
    }
    ours = groups(scores, "integration", "score")
    assert {frozenset(name.split("_")): value for name, value in ours.items()} == published
    assert len(published) == 16


def test_textvqa() -> None:
    textvqa = FILES / "textvqa"
    scores = rescore("textvqa", textvqa / "TextVQA_0.5.1_val.json", textvqa / "answers/llava-v1.5-13b.jsonl")
    assert len(scores.scored) == 5000
    assert round(official(scores), 1) == 61.3


def test_mmmu() -> None:
    """36.6 by the official parser, which draws three answers; the 328 right without luck are the published 36.4."""
    scores = rescore("mmmu", DATA / "mmmu/validation.parquet", FILES / "mmmu/llava1.5_13b")
    assert len(scores.scored) == 900
    assert round(official(scores), 1) == 36.6
    drawn = [one for one in scores.scored if one.verdicts[OFFICIAL].rule is DRAWN]
    assert [one.prediction for one in drawn] == ["A) Josef Albers", "D", "C) Schachter-Singer Theory"]
    assert sum(one.verdicts[OFFICIAL].score for one in scores.scored if one not in drawn) == 328


def test_the_uncertainty_of_the_published_answers() -> None:
    """A standard error of POPE's mean F1 that knows of shared pictures, and half widths of MMMU's and ScienceQA's."""
    scored = rescore("pope", FILES / "pope", FILES / "pope/answers/llava-v1.5-13b.jsonl").scored
    found = interval(scored, OFFICIAL, F1)
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(0.65, abs=0.02)
    alone = [replace(one, sample=replace(one.sample, cluster="")) for one in scored]
    naive = interval(alone, OFFICIAL, F1)
    assert (naive.high - naive.low) / 2 / 1.96 == pytest.approx(0.40, abs=0.02)
    mmmu = rescore("mmmu", DATA / "mmmu/validation.parquet", FILES / "mmmu/llava1.5_13b").scored
    found = interval(mmmu, OFFICIAL, ACCURACY)
    assert (found.high - found.low) / 2 == pytest.approx(3.1, abs=0.1)


def table(path: Path) -> dict[str, str]:
    """The row of the 13B model."""
    with path.open(newline="") as file:
        return next(row for row in csv.DictReader(file) if row[""] == "llava-v1.5-13b")
