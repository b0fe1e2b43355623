from pathlib import Path
from typing import Any

import pytest

from basalt.data.readers import DataError
from basalt.eval.benchmark import Sample
from basalt.eval.records import Gaps, join, read_json, read_predictions
from tests.eval.published_files import write_json, write_lines

SAMPLES = [Sample(str(number), "?", ("x",)) for number in range(200)]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("a.json", '{"a": 1}', {"a": 1}),
        ("a.json", '[{"a": 1},\n {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ("a.json", '{"a": 1}\n\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("a.jsonl", '{"a": 1}\n', [{"a": 1}]),
        ("a.jsonl", "", []),
        ("a.jsonl", '{\n"a": 1\n}', {"a": 1}),
        ("a.jsonl", '{"a": "x\u2028y\x85"}\n{"a": 2}\r\n', [{"a": "x\u2028y\x85"}, {"a": 2}]),
        ("a.json", '\ufeff{"a": 1}', {"a": 1}),
    ],
)
def test_json_is_read_by_what_it_holds(tmp_path: Path, name: str, text: str, value: Any) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_json(tmp_path / name) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.json is not valid JSON"),
        (b'{"a": 1', "a.json is not valid JSON"),
        (b'{"a": 1}\n{"a": \n{"a": 3}', "a.json, line 2 is not valid JSON"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b"[" * 100_000, "a.json is not valid JSON"),
    ],
)
def test_what_is_no_json_is_told_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "records",
    [
        [{"id": "1", "prediction": "a"}, {"id": 2, "prediction": "b"}],
        [{"question_id": 1, "prompt": "?", "text": "a"}, {"question_id": 2, "prompt": "?", "text": "b"}],
        [{"id": "1", "response": "a", "answer": "B"}, {"id": "2", "response": "b"}],
        {"1": "a", "2": "b"},
    ],
)
def test_answers_are_read_in_every_published_form(tmp_path: Path, records: Any) -> None:
    assert read_predictions(write_json(tmp_path / "a.json", records), SAMPLES) == {"1": "a", "2": "b"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": "1", "answer": "B"}], "row 0: an answer needs 'id' and 'prediction'.*it has 'id', 'answer'"),
        ([{"question_id": 1, "text": "a question"}], "it has 'question_id', 'text'"),
        ([{"id": "1", "prediction": 5}], "an answer is text, 'prediction' is int"),
        ([{"id": "1", "prediction": None}], "'prediction' is NoneType"),
        ([{"id": "1", "prediction": "a"}, {"id": 1, "prediction": "b"}], "'1' is answered twice"),
        (["a"], "row 0: expected an object, found str"),
        ("a", "expected answers, found one str"),
    ],
)
def test_what_is_no_answer_is_told(tmp_path: Path, records: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_predictions(write_json(tmp_path / "a.json", records), SAMPLES)


def test_answers_meet_samples_by_id_alone() -> None:
    answers = {str(number): f"a{number}" for number in reversed(range(200))}
    pairs, gaps = join(SAMPLES, answers)
    assert [answer for _, answer in pairs] == [f"a{number}" for number in range(200)]
    assert gaps == Gaps()


def test_a_few_gaps_are_told_and_many_refused() -> None:
    answers = {str(number): "a" for number in range(2, 200)}
    pairs, gaps = join(SAMPLES, answers)
    assert gaps == Gaps(("0", "1"), ()) and [answer for _, answer in pairs[:3]] == [None, None, "a"]
    del answers["2"]
    with pytest.raises(DataError, match=r"3 of 200 samples have no answer \('0', '1', '2'\), more than 1.0%"):
        join(SAMPLES, answers)
    both, gaps = join(SAMPLES, answers, intersection=True)
    assert len(both) == 197 and gaps.missing == ("0", "1", "2")
    assert len(join(SAMPLES, answers, max_gap=0.02)[0]) == 200


def test_answers_to_something_else_are_refused(tmp_path: Path) -> None:
    """An answer file of another split must not be scored as if it were short."""
    answers = {str(number): "a" for number in range(300)}
    with pytest.raises(DataError, match=r"100 of 300 answers have the id of no sample \('200', '201', '202', …\)"):
        join(SAMPLES, answers)
    with pytest.raises(DataError, match=r"no answer has the id of a sample: samples are '0'.*answers 'x'"):
        join(SAMPLES, {"x": "a"}, intersection=True)
    with pytest.raises(DataError, match="no answer has the id"):
        join(SAMPLES, read_predictions(write_lines(tmp_path / "a.jsonl", []), SAMPLES))
