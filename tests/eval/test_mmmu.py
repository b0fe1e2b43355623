import random
from pathlib import Path
from typing import Any

import pytest

from basalt.data.readers import DataError
from basalt.eval.benchmark import EMPTY, OFFICIAL, REFUSAL, STRICT, Rule, Sample
from basalt.eval.letters import OUTSIDE
from basalt.eval.mmmu import (
    BRACKETS,
    CHOICE,
    CLAIM,
    CONTENT,
    DISCIPLINE,
    DRAWN,
    EQUAL,
    IMAGES,
    LAST_BRACKETS,
    LAST_CONTENT,
    LAST_SPACED,
    NO_MATCH,
    NUMBER,
    ONE_OF_NUMBERS,
    OPEN,
    PART,
    SEVERAL,
    SPACED,
    read_choice,
    read_open,
    read_samples,
    score,
)
from basalt.eval.scoring import rescore
from tests.eval.published_files import picture, write_json, write_lines, write_parquet

OPTIONS = ["a red car", "a blue car", "$7", "none of these"]


def row(id: str = "validation_Math_1", **changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "id": id, "question": "Which is it in <image 1>?", "options": "['one', 'two', \"it's three\"]", "answer": "B",
        "question_type": CHOICE, **dict.fromkeys(IMAGES), "image_1": picture(),
    }  # fmt: skip
    return told | changes


def published(path: Path, *rows: dict[str, Any]) -> Path:
    return write_parquet(path / "validation.parquet", rows, IMAGES)


@pytest.mark.parametrize(
    ("response", "letter", "rule"),
    [
        ("B", "B", SPACED),
        ("B.,", "B", SPACED),
        ("(B)", "B", BRACKETS),
        ("It is (B) , not A ", "B", BRACKETS),
        ("A car", "A", SPACED),  # the article
        ("(A) or (B)", "B", LAST_BRACKETS),
        ("B or A then", "A", LAST_SPACED),
        ("we can see that the a blue car is there", "B", CONTENT),
        ("first a red car and then also $7 in change", "C", LAST_CONTENT),
    ],
)
def test_a_choice_is_read_as_the_official_parser_does(response: str, letter: str, rule: Rule) -> None:
    assert read_choice(response, OPTIONS, random.Random(0)) == (letter, rule)


@pytest.mark.parametrize("response", ["B)", "**B**", "B: $7", "option b", "", "a blue car"])
def test_what_the_official_parser_does_not_read_is_drawn_the_same_each_time(response: str) -> None:
    readings = [read_choice(response, OPTIONS, random.Random(seed)) for seed in range(40)]
    assert {reading.rule for reading in readings} == {DRAWN}
    assert {reading.answer for reading in readings} == set("ABCD")
    sample = Sample("validation_Math_1", "", ("B",), tuple(OPTIONS))
    assert score(sample, response)[OFFICIAL] == score(sample, response)[OFFICIAL]


@pytest.mark.parametrize(
    ("response", "values"),
    [
        ("42", [42]),
        ("The total is $1,234.50", ["$1,234.50", 1234, 234.5]),
        ("So x is 3\nthus y = 4.126.", [3, 4.13]),
        ("it is red. It is blue", ["blue"]),  # never cut into sentences
        ("-3.5e-7 or 10^3", ["-3.5e-7 or 10^3", 0, 10, 3, -3, -7]),
        ("A", [" a", "a "]),
        ("nothing", ["nothing"]),
        ("", [""]),
    ],
)
def test_an_open_answer_is_read_as_the_official_parser_does(response: str, values: list[str | float]) -> None:
    assert set(read_open(response)) == set(values)


@pytest.mark.parametrize(
    ("response", "gold", "official", "rule", "strict", "strict_rule"),
    [
        ("42", ["42"], 1, NUMBER, 1, CLAIM),
        ("The answer is 42.", ["42"], 1, NUMBER, 1, CLAIM),
        ("3 or 4 or 5", ["4"], 1, ONE_OF_NUMBERS, 0, SEVERAL),
        ("3 or 4 or 5. Answer: 4", ["4"], 1, ONE_OF_NUMBERS, 1, CLAIM),
        ("0.333", ["0.33"], 1, NUMBER, 1, CLAIM),
        ("0.015625", ["1/64"], 0, NO_MATCH, 0, CLAIM),
        ("10%", ["0.10"], 0, NO_MATCH, 0, CLAIM),
        ("the heart", ["Heart"], 1, PART, 1, CLAIM),
        ("it is heart", ["Heart"], 1, EQUAL, 0, CLAIM),
        ("sweetheart", ["Heart"], 1, PART, 0, CLAIM),
        ("It is a bird.", ["A"], 1, PART, 0, CLAIM),
        ("seven", ["7", "seven"], 1, EQUAL, 1, CLAIM),
        ("lung", ["Heart"], 0, NO_MATCH, 0, CLAIM),
        ("", ["Heart"], 0, NO_MATCH, 0, EMPTY),
        ("I am unable to say", ["Heart"], 0, NO_MATCH, 0, REFUSAL),
        ("−5", ["-5"], 0, NO_MATCH, 1, CLAIM),  # a minus sign, no hyphen
    ],
)
def test_an_open_answer_is_scored_officially_and_strictly(
    response: str, gold: list[str], official: int, rule: Rule, strict: int, strict_rule: Rule
) -> None:
    verdicts = score(Sample("1", "", tuple(gold)), response)
    assert (verdicts[OFFICIAL].score, verdicts[OFFICIAL].rule) == (official, rule)
    assert (verdicts[STRICT].score, verdicts[STRICT].rule) == (strict, strict_rule)


def test_the_prompt_is_the_official_one(tmp_path: Path) -> None:
    choice, question = read_samples(
        published(tmp_path, row(), row("validation_Math_2", question_type=OPEN, options="[]", answer="42"))
    )
    assert choice.prompt == (
        "Which is it in <image 1>?\n(A) one\n(B) two\n(C) it's three\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert question.prompt == "Which is it in <image 1>?\nAnswer the question using a single word or phrase."
    assert choice.options == ("one", "two", "it's three") and question.options == ()


def test_pictures_named_in_question_and_options_are_shown_in_order(tmp_path: Path) -> None:
    pictures = {"image_1": picture("red"), "image_2": picture("blue"), "image_3": picture("green")}
    named = row(question="See <image 3>.", options="['<image 1>', 'x']") | pictures
    unnamed = row("validation_Math_2", question="No name") | pictures
    third = row("validation_Math_3", image_1=picture("white"))  # in another row group
    first, second, last = read_samples(published(tmp_path, named, unnamed, third))
    assert [read() for read in first.images] == [pictures["image_1"]["bytes"], pictures["image_3"]["bytes"]]
    assert [read() for read in second.images] == [pictures["image_1"]["bytes"]]
    assert [read() for read in last.images] == [picture("white")["bytes"]]
    with pytest.raises(DataError, match="names pictures that it has not: image_2"):
        read_samples(published(tmp_path, row(question="See <image 2>.")))


def test_the_score_is_over_samples_and_by_subject_whatever_their_order(tmp_path: Path) -> None:
    data = published(
        tmp_path,
        row("validation_Math_1"),
        row("validation_Math_2"),
        row("validation_Art_Theory_1", question_type=OPEN, options="[]", answer="['7', 'seven']"),
    )
    raw = tmp_path / "model"
    for subject, records in {
        "Math": [
            {"id": "validation_Math_2", "response": "(B)", "answer": "A"},
            {"id": "validation_Math_1", "response": "B)"},
        ],
        "Art_Theory": [{"id": "validation_Art_Theory_1", "response": "7"}],
    }.items():
        (raw / subject).mkdir(parents=True)
        write_json(raw / subject / "output.json", records)
    scores = rescore("mmmu", data, raw)
    assert scores.overall[STRICT]["accuracy"] == 100
    assert {name: count for name, (count, _) in scores.groups["subject"].items()} == {"Math": 2, "Art_Theory": 1}
    assert scores.groups["discipline"]["Art and Design"][1][OFFICIAL]["accuracy"] == 100
    assert scores.rules(OFFICIAL)[DRAWN] == 1
    assert rescore("mmmu", data, raw).as_json() == scores.as_json()
    assert len(DISCIPLINE) == 30
    with pytest.raises(DataError, match=r"SUBJECT/output\.json"):
        rescore("mmmu", data, tmp_path)


def test_a_gold_letter_beyond_the_options_is_read_by_nobody(tmp_path: Path) -> None:
    """The published validation_Geography_15 is such a question."""
    (sample,) = read_samples(published(tmp_path, row(answer="D")))
    verdicts = score(sample, "D")
    assert (verdicts[OFFICIAL].score, verdicts[OFFICIAL].rule) == (0, DRAWN)
    assert (verdicts[STRICT].score, verdicts[STRICT].rule) == (0, OUTSIDE)


def test_the_test_split_has_no_labels_and_no_score(tmp_path: Path) -> None:
    data = published(tmp_path, row("test_Math_1", answer="?"))
    answers = write_lines(tmp_path / "a.jsonl", [{"id": "test_Math_1", "prediction": "A"}])
    with pytest.raises(DataError, match="1 of 1 samples have no label, as 'test_Math_1': no score is possible"):
        rescore("mmmu", data, answers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "validation_Magic_1"}, "one of the 30 subjects, found 'validation_Magic_1'"),
        ({"question_type": "essay"}, "the question type must be 'multiple-choice' or 'open', found 'essay'"),
        ({"options": "__import__('os')"}, "expected a list written as in Python"),
        ({"options": "["}, "expected a list written as in Python"),
        ({"options": "[]"}, r"'multiple-choice' with the options \[\]"),
        ({"question_type": OPEN}, "'open' with the options"),
        ({"answer": "two"}, "the answer to a multiple-choice question is a letter, found 'two'"),
        ({"image_1": None}, "names pictures that it has not: image_1"),
    ],
)
def test_wrong_records_are_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_samples(published(tmp_path, row() | change, row("validation_Math_2")))


def test_wrong_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="each sample needs an id of its own; 1 are not: 'validation_Math_1'"):
        read_samples(published(tmp_path, row(), row()))
    columns = {name: value for name, value in row().items() if name != "question_type"}
    with pytest.raises(DataError, match="has no column 'question_type'; it has id, question"):
        read_samples(published(tmp_path, columns))
    (tmp_path / "text.parquet").write_text("id,question")
    with pytest.raises(DataError, match="is not a parquet file"):
        read_samples(tmp_path / "text.parquet")
    with pytest.raises(DataError, match="holds no samples"):
        read_samples(Path(__file__).parent)
    with pytest.raises(DataError, match="holds no bytes"):
        read_samples(published(tmp_path, row(image_1={"bytes": None, "path": "a.png"})))[0].messages()
