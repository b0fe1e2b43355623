from pathlib import Path
from typing import Any

import pytest

from basalt.data.readers import DataError
from basalt.eval.benchmark import OFFICIAL, STRICT
from basalt.eval.mm_vet import GRADED, JUDGE_FAILED, RUN_LEFT_OUT, UNGRADED, read_grade, read_samples, run_scores
from basalt.eval.scoring import rescore
from tests.eval.published_files import picture, png, write_json, write_parquet


def record(image: str = "v1_0.png", **changes: Any) -> dict[str, Any]:
    told = {
        "imagename": image,
        "question": "What?",
        "answer": "a<AND>b",
        "capability": ["ocr", "math"],
        "imagesource": "",
    }
    return told | changes


def grade(*scores: float, replies: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"model": ["gpt-4"] * len(scores), "content": list(replies or map(str, scores)), "score": list(scores)}


def test_the_table_is_the_official_one(tmp_path: Path) -> None:
    data = write_json(
        tmp_path / "mm-vet.json",
        {
            "v1_0": record(),
            "v1_1": record("v1_1.png", capability=["rec"]),
            "v1_2": record("v1_1.png", capability=["ocr"]),
        },
    )
    grades = {"v1_1": grade(1, 1), "v1_2": grade(0.5, 0.1), "v1_0": grade(0, 0.2)}
    scores = rescore("mm-vet", data, write_json(tmp_path / "g.json", grades))
    assert run_scores(scores.scored) == pytest.approx([50, 130 / 3])
    assert scores.overall[OFFICIAL] == pytest.approx({"score": 140 / 3, "std": 10 / 3})
    assert scores.overall[STRICT] == pytest.approx({"score": 140 / 3})
    kinds = {
        kind: {name: figures[OFFICIAL]["score"] for name, (_, figures) in members.items()}
        for kind, members in scores.groups.items()
    }
    assert kinds["capability"] == pytest.approx({"math": 10, "ocr": 20, "rec": 100})
    assert kinds["integration"] == pytest.approx({"ocr": 30, "ocr_math": 10, "rec": 100})
    assert {one.sample.cluster for one in scores.scored} == {"v1_0.png", "v1_1.png"}


def test_a_judge_that_failed_is_a_state_of_its_own(tmp_path: Path) -> None:
    data = write_json(tmp_path / "mm-vet.json", {f"v1_{n}": record() for n in range(3)})
    grades = {
        "v1_0": grade(0.6, 0, replies=("0.6", "I would say good")),
        "v1_1": grade(0, 0, replies=("", "none")),
        "v1_2": grade(0.4, 0.4),
    }
    scores = rescore("mm-vet", data, write_json(tmp_path / "g.json", grades))
    assert [one.verdicts[OFFICIAL].rule for one in scores.scored] == [JUDGE_FAILED, JUDGE_FAILED, GRADED]
    assert [one.verdicts[STRICT].rule for one in scores.scored] == [RUN_LEFT_OUT, UNGRADED, GRADED]
    assert [one.verdicts[OFFICIAL].score for one in scores.scored] == pytest.approx([0.3, 0, 0.4])
    assert [one.verdicts[STRICT].score for one in scores.scored] == pytest.approx([0.6, 0, 0.4])


@pytest.mark.parametrize(
    ("reply", "score"),
    [("0.5", 0.5), ("1.0 because", 1), ("0", 0), ("\n0.3", 0.3), ("good", None), ("", None), ("7", None), ("-1", None),
     ("nan", None), ("inf", None), (" 0.5", None), ("0.5.", None)],
)  # fmt: skip
def test_a_grade_is_the_number_in_front(reply: str, score: float | None) -> None:
    assert read_grade(reply) == score


def test_the_parquet_is_the_same_benchmark(tmp_path: Path) -> None:
    (tmp_path / "v1_0.png").write_bytes(png())
    (published,) = read_samples(write_json(tmp_path / "mm-vet.json", {"v1_0": record()}), tmp_path)
    told = {
        "question_id": "v1_0",
        "question": "What?",
        "answer": "a<AND>b",
        "capability": "ocr,math",
        "image": picture(),
    }
    (parquet,) = read_samples(write_parquet(tmp_path / "test.parquet", [told]))
    for sample in (published, parquet):
        assert (sample.id, sample.prompt, sample.gold) == ("v1_0", "What?", ("a<AND>b",))
        assert sample.groups == {"capability": ("ocr", "math"), "integration": ("ocr_math",)}
        assert len(sample.messages()[0]["content"]) == 2


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ({"v1_0": grade(0.5), "v1_1": grade(0.5, 0.5)}, "samples have 1 to 2 runs of the judge; all need as many"),
        ({"v1_0": grade(1.5)}, "scores from 0 to 1"),
        ({"v1_0": grade()}, "scores from 0 to 1"),
        ({"v1_0": grade(0.5, replies=("0.5", "0.5"))}, "as many scores from 0 to 1 as replies"),
        ({"v1_0": grade(0.5, replies=("0.9",))}, "the judge's reply says 0.9, the stored score is 0.5"),
        ({"v1_0": {"score": [0.5]}}, "'v1_0': has no 'content'; it has 'score'"),
        ({"v1_0": {"score": ["high"], "content": ["high"]}}, "'v1_0': scores are numbers"),
        ({"v1_0": {"score": 0.5, "content": "0.5"}}, "'v1_0': scores and replies are lists"),
        ({"v1_0": 0.5}, "expected an object, found float"),
        ([grade(0.5)], "expected an object, found list"),
    ],
)
def test_wrong_grades_are_told(tmp_path: Path, grades: Any, message: str) -> None:
    data = write_json(tmp_path / "mm-vet.json", {"v1_0": record(), "v1_1": record()})
    with pytest.raises(DataError, match=message):
        rescore("mm-vet", data, write_json(tmp_path / "g.json", grades))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"capability": ["smell"]}, "some of rec, ocr.*found"), ({"capability": []}, "capabilities are some of")],
)
def test_wrong_records_are_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_samples(write_json(tmp_path / "mm-vet.json", {"v1_0": record(**change)}))
