"""Reports and pages, made of results as the commands leave them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from basalt.cli import app
from basalt.eval import conformance, report
from basalt.eval.conformance import Conformance
from basalt.eval.report import COLUMNS, PUBLISHED, write_report
from basalt.eval.results import load_result
from basalt.eval.run import Task, keep, parser_version
from tests.eval.published_files import picture, write_json, write_lines, write_parquet


@pytest.fixture(autouse=True)
def published_splits_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("mmmu", 90), ("scienceqa", 30)):
        monkeypatch.setitem(report.COLUMNS, name, replace(COLUMNS[name], sizes=(size,)))


IMAGES = [f"image_{number}" for number in range(1, 8)]
SUBJECTS = ("Math", "Art", "History")


def write_mmmu(path: Path, count: int = 90) -> Path:
    colours = ("red", "blue", "green")
    rows = [
        {
            "id": f"validation_{SUBJECTS[number % 3]}_{number}", "question": f"Which is it, number {number}? <image 1>",
            "options": "['first', 'second', 'third']", "answer": "ABC"[number % 3], "question_type": "multiple-choice",
            "image_1": picture(colours[number % 3]),
        }
        for number in range(count)
    ]  # fmt: skip
    return write_parquet(path, rows, IMAGES)


def stored(folder: Path, name: str, right: int, *, blind: bool = False, **texts: str) -> Path:
    """A result that has so many of 90 right, some answers being these texts."""
    data = folder / "validation.parquet"
    if not data.exists():
        write_mmmu(data)
    said = {
        f"validation_{SUBJECTS[n % 3]}_{n}": "ABC"[n % 3] if n < right else "ABC"[(n + 1) % 3] for n in range(90)
    } | texts
    keep(Task("mmmu", data, blind=blind), write_json(folder / f"{name}.json", said), name, folder / name)
    return folder / name


def asked(path: Path, name: str) -> Path:
    """As if a model had been asked, and not its stored answers scored."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["predictions"]
    manifest["model"] = {"model": name, "version": "sha256:0123456789abcdef", "fingerprint": None}
    write_json(path / "manifest.json", manifest)
    return path


def recipes(folder: Path) -> Path:
    for stage in (1, 2):
        path = folder / "recipes" / "big-8b" / f"stage{stage}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# train stage{stage} big-8b\ntower: x\n")
    return folder / "recipes"


def test_the_report_has_scores_with_intervals_beside_published_ones(tmp_path: Path) -> None:
    new, old = asked(stored(tmp_path, "new", 60), "tiny"), stored(tmp_path, "old", 40)
    blind = asked(stored(tmp_path, "blind", 30, blind=True), "tiny")
    quality = {
        "model": "tiny", "measured": "Measured so.", "notes": ["A note."],
        "figures": [{"data": "d", "figure": "colour", "value": 0.98, "low": 0.94, "high": 0.99, "count": 117}],
    }  # fmt: skip
    out = tmp_path / "EVAL_REPORT.md"
    write_report(
        [load_result(new), load_result(blind)],
        out,
        against=[load_result(old)],
        quality=write_json(tmp_path / "quality.json", quality),
        recipes=recipes(tmp_path),
    )
    text = out.read_text()
    row = cells(text, "**tiny@01234567**")
    assert re.fullmatch(r"66\.7 \[5\d\.\d, 7\d\.\d\]", row[1]) and row[2:] == ["not run"] * 4
    assert cells(text, "**tiny@01234567, blind**")[1].startswith("33.3 [")
    assert cells(text, "old, its stored answers scored here")[1].startswith("44.4 [")
    assert cells(text, "LLaVA-1.5-7B, published only: unpaired")[1:] == [
        "35.3<sup>1</sup>", "31.1<sup>2</sup>", "66.8<sup>3</sup>", "58.2<sup>4</sup>", "85.9<sup>5</sup>",
    ]  # fmt: skip
    assert cells(text, "big-8b")[1:] == ["not trained yet"] * 5
    assert "train stage1 big-8b\ntrain stage2 big-8b" in text
    assert "| tiny@01234567 | MMMU (val) | 66.7" in text and "| LLaVA-1.5-7B 35.3 | above |" in text
    paired = [line for line in text.splitlines() if "McNemar, exact" in line]
    assert [line.split(" | ")[1:3] for line in paired] == [
        ["tiny@01234567", "old"],
        ["tiny@01234567", "tiny@01234567, blind"],
    ]
    assert "+22.2 [" in paired[0] and "+33.3 [" in paired[1] and all("| yes |" in line for line in paired)
    assert "| d | colour | 0.98 [0.94, 0.99] of 117 |" in text and "- A note." in text
    assert "`basalt eval run pope --data coco_pope --images val2014 --model tiny`" in text
    assert "eval run mmmu" not in text
    assert load_result(new).manifest["hash"].removeprefix("sha256:")[:16] in text
    for kind in ("discipline", "subject"):
        assert f"](docs/images/eval/mmmu-{kind}.png)" in text
        with Image.open(tmp_path / f"docs/images/eval/mmmu-{kind}.png") as chart:
            assert chart.width > 500
    again = tmp_path / "again.md"
    write_report([load_result(new), load_result(blind)], again, against=[load_result(old)], recipes=tmp_path / "none")
    assert cells(again.read_text(), "**tiny@01234567**") == row


def cells(text: str, first: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return line.strip("| ").split(" | ")


def test_fallbacks_failures_and_gaps_are_told(tmp_path: Path) -> None:
    texts = {"validation_Math_0": "B) x", "validation_Math_3": "I'm sorry, I can't", "validation_Math_6": ""}
    path = asked(stored(tmp_path, "new", 90, **texts), "tiny")
    text = CliRunner().invoke(app, ["eval", "report", str(path), "--out", str(tmp_path / "r.md")])
    assert text.exit_code == 0, text.output
    told = (tmp_path / "r.md").read_text()
    assert re.search(r"\| official \| 90 \| 9\d\.\d \[.*\] \| 3\.3% \| – \| – \| – \|", told)
    assert re.search(r"\| strict \| 90 \| 9\d\.\d \[.*\] \| – \| 1\.1% \| 1\.1% \| – \|", told)


def test_a_result_without_a_score_says_why(tmp_path: Path) -> None:
    stored(tmp_path, "new", 90)
    answers = write_json(tmp_path / "a.json", {"validation_Math_0": "A"})
    keep(Task("mmmu", tmp_path / "validation.parquet"), answers, "s", tmp_path / "short")
    write_report([load_result(tmp_path / "short")], tmp_path / "r.md", recipes=tmp_path / "none")
    text = (tmp_path / "r.md").read_text()
    assert cells(text, "s, its stored answers scored here")[1] == "refused"
    assert "**s**: refused. 89 of 90 samples have no answer" in text


def test_the_badge_is_shown_for_the_code_that_was_checked_alone(tmp_path: Path, monkeypatch: Any) -> None:
    record = tmp_path / "conformance.json"
    monkeypatch.setattr(conformance, "RECORD", record)
    good = Conformance(parser_version("pope"), 8910, {"f1": "85.9"}, {"f1": "85.9"})
    bad = Conformance(parser_version("textvqa"), 5000, {"accuracy": "61.3"}, {"accuracy": "59.9"})
    old = Conformance("sha256:of-yesterday", 900, {"accuracy": "36.6"}, {"accuracy": "36.6"})
    conformance.write_record({"pope": good, "textvqa": bad, "mmmu": old})
    write_report([], tmp_path / "r.md", recipes=tmp_path / "none")
    text = (tmp_path / "r.md").read_text()
    assert "POPE: **exact** on 8,910 samples: f1 85.9" in text
    assert "TextVQA: **NOT met** on 5,000 samples: accuracy 59.9 (not 61.3)" in text
    assert "MMMU (val): not checked for this code" in text


def test_every_published_figure_has_a_protocol_and_a_source() -> None:
    published = json.loads(PUBLISHED.read_text())
    for model in published["models"]:
        for figure in model["figures"].values():
            assert figure["protocol"] and published["sources"][figure["source"]] and 0 < figure["value"] < 100


def test_two_results_of_one_model_and_benchmark_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, "new", 60)
    done = CliRunner().invoke(
        app, ["eval", "report", str(path), "--against", str(path), "--out", str(tmp_path / "r.md")]
    )
    assert done.exit_code == 1 and "two results of mmmu and new" in done.output


def test_groups_that_are_the_headline_are_scored_alone(tmp_path: Path) -> None:
    """ScienceQA's score in papers is over its questions with a picture."""
    told = {"from": "gpt", "value": "A"}
    rows = [
        {"id": str(n), "conversations": [{"from": "human", "value": f"{n}?\nA. a\nB. b"}, told]}
        | ({"image": f"{n}/image.png"} if n < 10 else {})
        for n in range(30)
    ]
    data = write_json(tmp_path / "llava_test_CQM-A.json", rows)
    said = write_lines(tmp_path / "a.jsonl", [{"id": str(n), "prediction": "AB"[n >= 5]} for n in range(30)])
    keep(Task("scienceqa", data), said, "m", tmp_path / "run")
    write_report([load_result(tmp_path / "run")], tmp_path / "r.md", recipes=tmp_path / "none")
    assert cells((tmp_path / "r.md").read_text(), "m, its stored answers scored here")[3].startswith("50.0 [")


def test_own_data_in_a_benchmark_s_form_is_never_put_beside_published_scores(tmp_path: Path) -> None:
    write_mmmu(tmp_path / "validation.parquet", 60)
    said = write_json(tmp_path / "a.json", {f"validation_{SUBJECTS[n % 3]}_{n}": "A" for n in range(60)})
    keep(Task("mmmu", tmp_path / "validation.parquet"), said, "m", tmp_path / "run")
    asked(tmp_path / "run", "tiny")
    write_report([load_result(tmp_path / "run")], tmp_path / "r.md", recipes=tmp_path / "none")
    text = (tmp_path / "r.md").read_text()
    assert cells(text, "**tiny@01234567**")[1:] == ["not run"] * 5
    assert "## Own data in the form of MMMU (val)" in text and "LLaVA-1.5-7B 35.3" not in text
    assert "`basalt eval run mmmu --data validation.parquet --model tiny`" in text
    assert (tmp_path / "docs/images/eval/mmmu-own-subject.png").exists()


def test_a_part_of_a_benchmark_says_so_and_how_the_whole_is_run(tmp_path: Path) -> None:
    write_mmmu(tmp_path / "validation.parquet")
    task = Task("mmmu", tmp_path / "validation.parquet", limit=30)
    said = write_json(tmp_path / "a.json", {sample.id: "A" for sample in task.samples()})
    keep(task, said, "m", tmp_path / "run")
    write_report([load_result(asked(tmp_path / "run", "tiny"))], tmp_path / "r.md", recipes=tmp_path / "none")
    text = (tmp_path / "r.md").read_text()
    assert cells(text, "**tiny@01234567**")[1].endswith("], 30 samples")
    assert "`basalt eval run mmmu --data validation.parquet --model tiny`" in text


def test_captions_have_all_their_figures(tmp_path: Path) -> None:
    references = {"a": ["a dog runs on grass"], "b": ["two men sit at tables"], "c": ["a red car"]}
    data = write_lines(tmp_path / "c.jsonl", [{"image": name, "captions": texts} for name, texts in references.items()])
    said = write_json(tmp_path / "a.json", {"a": "a dog runs", "b": "two men sit at tables", "c": ""})
    keep(Task("captions", data), said, "m", tmp_path / "run")
    write_report([load_result(tmp_path / "run")], tmp_path / "r.md", recipes=tmp_path / "none")
    text = (tmp_path / "r.md").read_text()
    assert "## Captions" in text and "CIDEr-D × 100 of all" in text
    assert "| scoring | bleu 1 | bleu 2 | bleu 3 | bleu 4 |" in text
    assert re.search(r"\| m \| coco-caption \| 3 \| \d+\.\d \[.*\] \| – \| 33\.3% \|", text)
