"""Drawn scenes in the forms of the benchmarks: read by the benchmarks' own readers, and true of what is drawn."""

import json
from collections import Counter
from pathlib import Path

import pytest

from basalt.data.drawn_benchmarks import make_benchmarks
from basalt.data.scenes import make_scenes
from basalt.eval.records import read_rows
from basalt.eval.scoring import find, score_answers

READ = {
    "pope": ("pope", "pope/images"),
    "scienceqa": ("scienceqa", "scienceqa/images"),
    "textvqa": ("textvqa/TextVQA_0.5.1_val.json", "textvqa/images"),
}


@pytest.fixture(scope="module")
def scenes(package: Path, font: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    return make_scenes(out, emoji=[package], fonts=[font], count=160, seed=3, split="test", workers=1).parent


@pytest.fixture(scope="module")
def made(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_benchmarks(scenes, tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("benchmark", READ)
def test_the_benchmark_s_own_reader_takes_them_and_gold_answers_are_right(benchmark: str, made: Path) -> None:
    data, images = (made / part for part in READ[benchmark])
    samples = find(benchmark).read_samples(data, images)
    assert len(samples) > 20
    for sample in samples:
        assert len(sample.messages()[0]["content"]) == 2  # a picture and the text
    scores = score_answers(benchmark, samples, {sample.id: sample.gold[0] for sample in samples})
    assert {figure for figures in scores.overall.values() for figure in [next(iter(figures.values()))]} == {100.0}


def test_what_is_asked_about_is_there_or_not(scenes: Path, made: Path) -> None:
    boxes = json.loads((scenes / "boxes.json").read_text())
    for category in ("random", "popular", "adversarial"):
        records = list(read_rows(made / "pope" / f"coco_pope_{category}.json"))
        assert len({record["question_id"] for record in records}) == len(records)
        labels = Counter(record["label"] for record in records)
        assert labels["no"] >= 0.8 * labels["yes"]
        for record in records:
            shown = {label for label, *_ in boxes[f"images/{record['image']}"]}
            noun = record["text"].removeprefix("Is there ").removesuffix(" in the image?")
            noun = noun.removeprefix("an ").removeprefix("a ")
            assert any(label.endswith(noun) for label in shown) == (record["label"] == "yes")


def test_choices_differ_and_the_right_one_has_no_place_of_its_own(made: Path) -> None:
    problems = json.loads((made / "scienceqa/problems.json").read_text()).values()
    assert all(len(set(problem["choices"])) == 4 for problem in problems)
    assert len({problem["answer"] for problem in problems}) == 4


def test_the_same_scenes_give_the_same_files(scenes: Path, made: Path, tmp_path: Path) -> None:
    again = make_benchmarks(scenes, tmp_path)
    for path in made.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (again / path.relative_to(made)).read_bytes()
