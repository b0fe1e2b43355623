import json
from pathlib import Path
from typing import Any

import pytest

from basalt.data.readers import DataError
from basalt.eval.benchmark import OFFICIAL, STRICT, Rule
from basalt.eval.scienceqa import EXACT, FAILED, LEADING, NO_CHOICE, PHRASE, read_official, read_samples
from basalt.eval.scoring import rescore
from tests.eval.published_files import picture, png, write_json, write_lines, write_parquet

PROBLEM = {
    "question": "Which is a mammal?", "choices": ["frog", "dog", "fish"], "answer": 1, "hint": "Think of milk.",
    "image": None, "task": "closed choice", "grade": "grade3", "subject": "natural science", "topic": "biology",
    "category": "Animals", "skill": "…", "lecture": "", "solution": "", "split": "test",
}  # fmt: skip
PROMPT = """Context: Think of milk.
Which is a mammal?
A. frog
B. dog
C. fish
Answer with the option's letter from the given choices directly."""


def folder(path: Path, problems: dict[str, dict[str, Any]], test: list[str]) -> Path:
    write_json(path / "problems.json", problems)
    write_json(path / "pid_splits.json", {"train": [], "test": test})
    return path


@pytest.mark.parametrize(
    ("answer", "letter", "rule"),
    [
        ("B", "B", EXACT),
        ("B. dog", "B", LEADING),
        ("B. ", "B", LEADING),
        ("I think so. The answer is B.", "B", PHRASE),
        ("The answer is B!", "B", PHRASE),  # its full stop is any character
        ("The answer is A. The answer is B.", "", FAILED),
        ("The answer is B", "", FAILED),
        ("B.", "", FAILED),
        ("(B)", "", FAILED),
        ("b", "", FAILED),
        ("", "", FAILED),
        ("E", "", NO_CHOICE),
        ("D. cat", "", NO_CHOICE),
        ("The answer is Z.", "", NO_CHOICE),
    ],
)
def test_an_answer_is_read_as_the_official_script_does(answer: str, letter: str, rule: Rule) -> None:
    assert read_official(answer, 3) == (letter, rule)


def test_folder_and_parquet_and_llavas_questions_are_the_same_benchmark(tmp_path: Path) -> None:
    pictured = PROBLEM | {"image": "image.png"}
    (tmp_path / "pictures" / "7").mkdir(parents=True)
    (tmp_path / "pictures" / "7" / "image.png").write_bytes(png())
    published = read_samples(folder(tmp_path, {"7": pictured, "8": PROBLEM}, ["7", "8"]), tmp_path / "pictures")
    columns = {name: value for name, value in PROBLEM.items() if name != "split"}
    parquet = write_parquet(tmp_path / "test.parquet", [columns | {"image": picture()}, columns])
    asked = {"from": "human", "value": PROMPT.rsplit("\n", 1)[0]}
    told = {"from": "gpt", "value": "B"}
    llava = [
        {"id": "7", "image": "7/image.png", "conversations": [asked | {"value": f"<image>\n{asked['value']}"}, told]},
        {"id": "8", "conversations": [asked, told]},
    ]
    questions = read_samples(write_json(tmp_path / "llava_test_CQM-A.json", llava), tmp_path / "pictures")
    for samples in (published, read_samples(parquet), questions):
        assert [sample.prompt for sample in samples] == [PROMPT, PROMPT]
        assert [sample.gold for sample in samples] == [("B",), ("B",)]
        assert [sample.options for sample in samples] == [("frog", "dog", "fish")] * 2
        assert [sample.groups["context"] for sample in samples] == [("image",), ("no image",)]
        assert [len(sample.messages()[0]["content"]) for sample in samples] == [2, 1]
    assert published[0].groups["topic"] == ("biology",)
    assert [sample.id for sample in published] == [sample.id for sample in questions] == ["7", "8"]


def test_a_context_with_lines_like_choices_is_no_choice(tmp_path: Path) -> None:
    text = "Context: The list has\nA. one\nB. two\nWhich?\nA. yes\nB. no"
    rows = [{"id": "1", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "B"}]}]
    (sample,) = read_samples(write_json(tmp_path / "q.json", rows))
    assert sample.options == ("yes", "no")
    assert sample.prompt == f"{text}\nAnswer with the option's letter from the given choices directly."


def test_published_answers_are_scored_with_and_without_picture(tmp_path: Path) -> None:
    data = folder(tmp_path, {"1": PROBLEM | {"image": "image.png"}, "2": PROBLEM, "3": PROBLEM}, ["1", "2", "3"])
    output = {
        "correct": [{"question_id": "3", "pred": "B", "parsed_ans": "B"}],
        "incorrect": [{"question_id": "1", "pred": "(B)"}, {"question_id": "2", "pred": "C"}],
    }
    # LLaVA calls this one object `*.jsonl`, and breaks its lines.
    path = tmp_path / "output.jsonl"
    path.write_text(json.dumps(output, indent=2))
    scores = rescore("scienceqa", data, path)
    assert scores.overall[OFFICIAL]["accuracy"] == pytest.approx(100 / 3)
    assert scores.overall[STRICT]["accuracy"] == pytest.approx(200 / 3)
    assert scores.groups["context"]["image"][1] == {OFFICIAL: {"accuracy": 0}, STRICT: {"accuracy": 100}}
    assert scores.differences() == {("failed", "letter"): 1}
    output["correct"] += output["incorrect"]
    with pytest.raises(DataError, match="'1' is answered twice"):
        rescore("scienceqa", data, write_json(tmp_path / "output.json", output))
    lines = write_lines(tmp_path / "ours.jsonl", [{"id": n, "prediction": "B"} for n in "312"])
    assert rescore("scienceqa", data, lines).overall[OFFICIAL]["accuracy"] == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "the answer 3 must be the place of one of its 3 choices"),
        ({"answer": -1}, "the answer -1 must be"),
        ({"answer": "B"}, "the answer 'B' must be"),
        ({"answer": True}, "the answer True must be"),
        ({"choices": list("abcdef")}, "one of its 6 choices"),
    ],
)
def test_wrong_records_are_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_samples(folder(tmp_path, {"1": PROBLEM | change}, ["1"]))


def test_wrong_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'minival'; it has train, test"):
        read_samples(folder(tmp_path, {"1": PROBLEM}, ["1"]), split="minival")
    with pytest.raises(DataError, match="'2': the split names it, and there is no such problem"):
        read_samples(folder(tmp_path, {"1": PROBLEM}, ["2"]))
    with pytest.raises(DataError, match="each sample needs an id of its own"):
        read_samples(folder(tmp_path, {"1": PROBLEM}, ["1", "1"]))
    with pytest.raises(DataError, match="has no 'hint'"):
        read_samples(folder(tmp_path, {"1": {k: v for k, v in PROBLEM.items() if k != "hint"}}, ["1"]))
    with pytest.raises(DataError, match="has no column 'hint', 'grade'"):
        columns = {name: PROBLEM[name] for name in ("question", "choices", "answer", "subject", "topic")}
        read_samples(write_parquet(tmp_path / "test.parquet", [columns]))
    rows = [{"id": "1", "conversations": [{"from": "human", "value": "no choices"}, {"from": "gpt", "value": "B"}]}]
    with pytest.raises(DataError, match=r"row 0: expected a question with choices"):
        read_samples(write_json(tmp_path / "q.json", rows))
