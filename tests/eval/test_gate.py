"""Versions compared from their stored results, as a pipeline would."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from basalt.cli import app
from basalt.data.readers import DataError
from basalt.eval.gate import gate
from basalt.eval.results import StoredResult, compare_results, load_result
from basalt.eval.run import Task, keep
from tests.eval.published_files import write_json, write_lines


def write_questions(folder: Path, count: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"id": str(n), "image": f"{n}.png", "question": "?", "answer": f"a{n}"} for n in range(count)]
    return write_json(folder / "q.json", rows)


def write_pope(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [
        {"question_id": n, "image": f"{n // 6}.jpg", "text": "?", "label": ("yes", "no")[n % 2]} for n in range(300)
    ]
    write_lines(folder / "coco_pope_random.json", rows)
    return folder


def stored(folder: Path, name: str, right: range, data: Path | None = None, benchmark: str = "vqa") -> Path:
    """The result of a version that is right on these samples."""
    data = data or write_questions(folder)
    if benchmark == "vqa":
        said = {str(n): f"a{n}" if n in right else "wrong" for n in range(100)}
    else:
        said = {str(10_000_000 + n): ("Yes", "No")[(n % 2) ^ (n not in right)] for n in range(300)}
    keep(Task(benchmark, data), write_json(folder / f"{name}.json", said), name, folder / name)
    return folder / name


def run(*words: object) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["eval", "gate", *map(str, words)])
    return done.exit_code, done.output


def test_a_significantly_worse_version_fails_and_a_little_worse_one_passes(tmp_path: Path) -> None:
    old = stored(tmp_path, "old", range(80))
    worse, same, better = (stored(tmp_path, f"new{n}", range(n)) for n in (60, 78, 95))
    code, output = run(worse, "--against", old)
    assert code == 1 and "significantly worse than old: -20.0 points" in output
    assert run(same, "--against", old)[0] == 0
    code, output = run(better, "--against", old)
    assert code == 0 and "+15.0" in output and "95.0" in output


def test_a_threshold_may_not_be_undercut(tmp_path: Path) -> None:
    new = stored(tmp_path, "new", range(60))
    assert run(new, "--minimum", "vqa=60")[0] == 0
    code, output = run(new, "--minimum", "vqa=60.5")
    assert code == 1 and "60.0 is under 60.5" in output


def test_several_benchmarks_are_adjusted_together_and_matched_by_their_data(tmp_path: Path) -> None:
    pope = write_pope(tmp_path / "pope")
    old = [stored(tmp_path, "old", range(80)), stored(tmp_path, "old-pope", range(270), pope, "pope")]
    new = [stored(tmp_path, "new-pope", range(265), pope, "pope"), stored(tmp_path, "new", range(74))]
    alone = gate([load_result(new[1])], [load_result(old[0])], {})
    checks = gate([load_result(path) for path in new], [load_result(path) for path in old], {})
    assert [check.result.benchmark for check in checks] == ["pope", "vqa"]
    assert alone[0].p == pytest.approx(0.03125) and alone[0].problems
    assert checks[1].p == pytest.approx(0.0625) and not checks[1].problems
    assert checks[0].comparison and checks[0].comparison.test == "paired bootstrap"


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    old = stored(tmp_path, "old", range(80))
    other = stored(tmp_path / "other", "x", range(80), write_questions(tmp_path / "other", 99))
    for words, message in (
        ([old], "nothing to check"),
        ([old, "--against", other], "no result is of the same benchmark, data and sight"),
        ([old, "--against", old, "--against", old], "2 results to compare it with"),
        ([old, "--minimum", "pope=3"], "give --against, or --minimum"),
        ([old, "--minimum", "vqa=3", "--minimum", "pope=3"], "a minimum for pope, of which there is no result"),
        ([tmp_path, "--against", old], "is not the directory of a run"),
    ):
        code, output = run(*words)
        assert code == 1 and message in output.replace("\n", ""), output


def test_a_run_without_a_score_does_not_pass(tmp_path: Path) -> None:
    old = stored(tmp_path, "old", range(80))
    short = write_json(tmp_path / "short.json", {"1": "a1"})
    keep(Task("vqa", tmp_path / "q.json"), short, "short", tmp_path / "short")
    code, output = run(tmp_path / "short", "--against", old)
    assert code == 1 and "refused: 99 of 100 samples have no answer" in output
    with pytest.raises(DataError, match="has no score"):
        compare_results(load_result(old), load_result(tmp_path / "short"), "soft")


def test_two_runs_that_share_too_few_samples_are_not_compared(tmp_path: Path) -> None:
    old = load_result(stored(tmp_path, "old", range(80)))
    half = StoredResult(old.directory, old.manifest, old.run, old.scores, old.scored[:50])
    with pytest.raises(DataError, match="share 50 of 100 samples"):
        compare_results(half, old, "soft")


def test_a_kept_result_says_what_it_came_of_and_is_scored_again_the_same(tmp_path: Path) -> None:
    path = stored(tmp_path, "kept", range(50))
    before = json.loads((path / "scores.json").read_text())
    again = CliRunner().invoke(app, ["eval", "rescore", str(path), "--json"])
    assert json.loads(again.stdout) == before
    result = load_result(path)
    assert (result.name, result.benchmark, len(result.scored)) == ("kept", "vqa", 100)
    assert result.scored[0].prediction == "a0" and result.scored[0].sample.gold == ("a0",)
    assert result.interval("exact").value == 50
