"""ScienceQA: multiple-choice science questions of school, about half of them with a picture (Lu et al. 2022).

Official are the prompt and rules by which LLaVA-1.5 is scored (`llava/eval/eval_science_qa.py` and the CQM-A form of
`scripts/convert_sqa_to_llava.py`, LLaVA 1.2). What papers on assistants call "SQA" is the group `image` alone.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from basalt.data.readers import DataError, ImageSource
from basalt.eval import records
from basalt.eval.benchmark import OFFICIAL, STRICT, Reading, Rule, Sample, Verdict
from basalt.eval.letters import LETTERS, read_letter
from basalt.eval.records import answer_of, checked, image_in, read_json, read_parquet, read_rows, require, unique

INSTRUCTION = "Answer with the option's letter from the given choices directly."
OFFICIAL_LETTERS = "ABCDE"  # no question has more choices

EXACT = Rule("the letter itself", "read", "the answer is one capital from A to E and nothing else")
LEADING = Rule("'X. ' first", "read", "the answer begins with a letter, a full stop and a space")
PHRASE = Rule("'The answer is X.'", "read", "the answer has just one 'The answer is X.'")
NO_CHOICE = Rule("letter of no choice", "failure", "the letter that was read belongs to no choice: wrong")
FAILED = Rule("failed", "failure", "none of the official forms: wrong")

_OUTPUT = {"correct", "incorrect"}
_PHRASE = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as in the original
_CHOICE = re.compile(r"\n([A-E])\. ")


def read_samples(path: Path, images: Path | None = None, *, split: str = "test") -> list[Sample]:
    """The samples of a folder with `problems.json` and `pid_splits.json`, of the parquet, or of LLaVA's questions.

    LLaVA's question file is `llava_test_CQM-A.json`, where context and choices are already one text. `split` is of
    the folder: the other forms hold one split. Pictures are `PID/image.png` in `images`.

    Raises:
        DataError: a record is not as published.
    """
    source = ImageSource(images) if images else None
    samples = []
    for record, where in _records(path, split):
        choices, answer = record["choices"], record["answer"]
        if type(answer) is not int or not 0 <= answer < len(choices) <= len(OFFICIAL_LETTERS):
            raise DataError(f"{where}: the answer {answer!r} must be the place of one of its {len(choices)} choices")
        read = record["image"]
        if isinstance(read, str):
            read = image_in(source, f"{record['pid']}/{read}")
        topics = {name: (str(record[name]),) for name in ("subject", "topic", "grade") if name in record}
        samples.append(
            Sample(
                id=record["pid"],
                prompt=prompt(record["question"], choices, record["hint"]),
                gold=(LETTERS[answer],),
                options=tuple(choices),
                images=(read,) if read else (),
                groups={"context": ("image" if read else "no image",)} | topics,
                cluster=record["pid"],
            )
        )
    return checked(samples, path)


def prompt(question: str, choices: list[str], hint: str = "") -> str:
    """The official prompt of LLaVA, after the picture if there is one."""
    context = f"Context: {hint}\n" if hint else ""
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{context}{question}\n{listed}\n{INSTRUCTION}"


def read_official(answer: str, choices: int) -> Reading:
    """`eval_science_qa.py`: so "B.", "(B)" and "b" are wrong, and so is a second 'The answer is'."""
    if len(answer) == 1 and answer in OFFICIAL_LETTERS:
        letter, rule = answer, EXACT
    elif len(answer) >= 3 and answer[0] in OFFICIAL_LETTERS and answer[1:3] == ". ":
        letter, rule = answer[0], LEADING
    elif len(phrases := _PHRASE.findall(answer)) == 1:
        letter, rule = phrases[0], PHRASE
    else:
        return Reading("", FAILED)
    return Reading(letter, rule) if letter in OFFICIAL_LETTERS[:choices] else Reading("", NO_CHOICE)


def read_predictions(path: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """Answers by id, of our own file, or of LLaVA's `*_output.jsonl`: one object, the right and the wrong apart.

    Raises:
        DataError: a record is of no known form, or an id occurs twice.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not found.keys() >= _OUTPUT:
        return records.read_predictions(path, samples)
    rows = [
        (require(record, ("question_id", "pred"), where), where)
        for part in sorted(_OUTPUT)
        for number, record in enumerate(found[part])
        for where in [f"{path}, {part}, row {number}"]
    ]
    return unique(
        (answer_of({"id": row["question_id"], "prediction": row["pred"]}, where) for row, where in rows), path
    )


def score(sample: Sample, prediction: str) -> dict[str, Verdict]:
    """A point for the right letter, by each way of reading."""
    readings = {
        OFFICIAL: read_official(prediction, len(sample.options)),
        STRICT: read_letter(prediction, sample.options),
    }
    return {
        way: Verdict(float(reading.answer in sample.gold), reading.rule, reading.answer)
        for way, reading in readings.items()
    }


def _records(path: Path, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Records with `pid` and, as `image`, the picture's name, what reads it, or `None`."""
    keys = ("question", "choices", "answer", "hint", "image")
    if path.suffix == ".parquet":
        columns = ["question", "choices", "answer", "hint", "grade", "subject", "topic"]
        for number, row in enumerate(read_parquet(path, columns, ["image"])):
            yield row | {"pid": str(number)}, f"{path}, row {number}"
    elif path.is_dir():
        problems, splits = read_json(path / "problems.json"), read_json(path / "pid_splits.json")
        if split not in splits:
            raise DataError(f"{path / 'pid_splits.json'} has no split {split!r}; it has {', '.join(splits)}")
        for pid in splits[split]:
            where = f"{path / 'problems.json'}, {pid!r}"
            if pid not in problems:
                raise DataError(f"{where}: the split names it, and there is no such problem")
            yield require(problems[pid], keys, where) | {"pid": pid}, where
    else:
        for number, record in enumerate(read_rows(path)):
            where = f"{path}, row {number}"
            require(record, ("id", "conversations"), where)
            yield _from_llava(record, where), where


def _from_llava(record: dict[str, Any], where: str) -> dict[str, Any]:
    """One row of LLaVA's question file, its text taken apart again."""
    try:
        asked, told = (turn["value"] for turn in record["conversations"])
        text = asked.replace("<image>", "").strip()
        # The choices are the last run of A., B., …: the context may have such lines too.
        marks = list(_CHOICE.finditer(text))
        first = max(place for place, mark in enumerate(marks) if mark[1] == "A")
        marks = marks[first:]
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        choices = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: expected a question with choices from 'A. ' and an answer: {error}") from error
    image = Path(record["image"]).name if "image" in record else None
    question = text[: marks[0].start()]
    return {
        "pid": str(record["id"]), "question": question, "choices": choices, "answer": LETTERS.find(told),
        "hint": "", "image": image,
    }  # fmt: skip
