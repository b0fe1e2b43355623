import json
from pathlib import Path
from typing import Any

import pytest

from basalt.data.readers import DataError
from basalt.eval.benchmark import EMPTY, REFUSAL, Rule, Sample
from basalt.eval.scoring import rescore
from basalt.eval.vqa import (
    AS_GIVEN,
    CONTAINS,
    EXACT,
    PROCESSED,
    SOFT,
    UNMATCHED,
    WITHIN,
    as_given_score,
    process,
    read_samples,
    score,
    soft,
)
from tests.eval.published_files import png, write_json, write_lines


@pytest.mark.parametrize(
    ("text", "processed"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("The cat, and a dog", "cat and dog"),
        ("N/A", "n"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("the dog's", "dog 's"),
        ("What?", "what"),
        ("1,000", "1000"),
        ("7:30", "7:30"),
        ("a/b", "b"),  # the mark becomes a blank, and "a" an article
        ("x / y", "x y"),
        ("x/y -z", "x y z"),
        ("self-made", "self made"),
        ("3.5 m.", "3.5 m"),
        ("p.m.", "pm"),
        ("." * 33 + "x", ".x"),  # 32 full stops go, no more
        ("two\nwords\there", "2 words here"),
        ("", ""),
    ],
)
def test_the_official_processing_with_its_quirks(text: str, processed: str) -> None:
    assert process(text) == processed


@pytest.mark.parametrize(("agree", "earned"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_of_ten_people_four_make_it_right(agree: int, earned: float) -> None:
    assert soft("Blue", ["blue"] * agree + ["red"] * (10 - agree)).score == earned


@pytest.mark.parametrize(
    ("prediction", "soft_rule", "earned", "as_given"),
    [
        ("2.", AS_GIVEN, 1.0, 1.0),
        ("two", PROCESSED, 1.0, 0.0),
        ("three", UNMATCHED, 0.0, 0.0),
        ("", EMPTY, 0.0, 0.0),
        ("I cannot read the sign.", REFUSAL, 0.0, 0.0),
    ],
)
def test_the_rule_says_if_the_processing_made_the_score(
    prediction: str, soft_rule: Rule, earned: float, as_given: float
) -> None:
    verdict = soft(prediction, ["2"] * 10)
    assert (verdict.rule, verdict.score) == (soft_rule, earned)
    assert as_given_score(prediction, ["2"] * 10).score == as_given


@pytest.mark.parametrize(
    ("prediction", "scores"),
    [
        ("A red car.", (1, 0, 1)),
        ("red car", (1, 1, 1)),
        ("It is the Red Car there", (0, 0, 1)),
        ("a red cart", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_ones_own_questions_are_scored_in_three_ways(prediction: str, scores: tuple[int, int, int]) -> None:
    verdicts = score(Sample("1", "What?", ("red car", "lorry")), prediction)
    assert tuple(verdicts[way].score for way in (SOFT, EXACT, CONTAINS)) == scores
    if scores[2]:
        assert verdicts[CONTAINS].rule is WITHIN


def test_ones_own_files_are_read_and_scored(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "image": "a.png", "question": "What?", "answer": "dog"},
        {"id": 2, "image": "a.png", "question": "Who?", "answers": ["me", "us"]},
    ]
    (tmp_path / "a.png").write_bytes(png())
    samples = read_samples(write_lines(tmp_path / "q.jsonl", rows), tmp_path)
    assert [(one.id, one.gold, one.cluster) for one in samples] == [
        ("1", ("dog",), "a.png"),
        ("2", ("me", "us"), "a.png"),
    ]
    assert len(samples[0].messages()[0]["content"]) == 2
    file = write_json(tmp_path / "q.json", rows)
    answers = write_json(tmp_path / "a.json", {"2": "Us!", "1": "a dog"})
    scores = rescore("vqa", file, answers)
    assert {way: figures["accuracy"] for way, figures in scores.overall.items()} == {
        SOFT: 100, EXACT: 50, CONTAINS: 100,
    }  # fmt: skip
    assert json.loads(json.dumps(scores.as_json()))["samples"] == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "image": "a.png", "question": "?"}, r"needs the accepted 'answers'.*found \[\]"),
        ({"id": "1", "image": "a.png", "question": "?", "answers": "dog"}, "found 'dog'"),
        ({"id": "1", "image": "a.png", "question": "?", "answers": [1]}, r"found \[1\]"),
        ({"id": "1", "question": "?", "answer": "dog"}, "row 0: has no 'image'; it has 'id', 'question', 'answer'"),
        ({"id": "", "image": "a.png", "question": "?", "answer": "dog"}, "needs an id of its own"),
        (7, "row 0: expected an object, found int"),
    ],
)
def test_wrong_records_are_told(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_samples(write_json(tmp_path / "q.json", [row]))
