"""TextVQA: questions about the writing in photographs, ten people's answers to each (Singh et al. 2019).

Official are the prompt and rules by which LLaVA-1.5 is scored (`llava/eval/eval_textvqa.py`, LLaVA 1.2). Its prompt
tells what an OCR system read; without that line the scores are another protocol's (7B: 58.2 with, 45.5 without).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from basalt.data.readers import DataError, ImageSource
from basalt.eval.benchmark import OFFICIAL, STRICT, Sample, Verdict
from basalt.eval.records import (
    answer_of,
    checked,
    image_in,
    prediction_records,
    read_json,
    read_parquet,
    read_rows,
    require,
    unique,
)
from basalt.eval.vqa import PEOPLE, as_given_score, soft

_TOKENS = "\nReference OCR token: "
_INSTRUCTION = "\nAnswer the question using a single word or phrase."


def read_samples(path: Path, images: Path | None = None, *, ocr: Path | None = None) -> list[Sample]:
    """The samples of `TextVQA_0.5.1_val.json`, or of the parquet (`lmms-lab/textvqa`), which has OCR tokens.

    Args:
        ocr: LLaVA's question file `llava_textvqa_val_v051_ocr.jsonl`, for the JSON: what the OCR system read.

    Raises:
        DataError: a record is not as published.
    """
    source = ImageSource(images) if images else None
    read = _read_ocr(ocr) if ocr else {}
    samples = []
    for record, where in _records(path):
        answers, name, question = record["answers"], record["image_id"], record["question"]
        if len(answers) != PEOPLE:
            raise DataError(
                f"{where}: {len(answers)} answers; the score is defined for {PEOPLE}, and the test has none"
            )
        tokens = record.get("ocr_tokens")
        if ocr:
            if (name, question.lower()) not in read:
                raise DataError(f"{where}: {ocr} has no such question about the image {name!r}")
            tokens = read[name, question.lower()]
        elif tokens is not None:
            tokens = ", ".join(tokens)
        samples.append(
            Sample(
                id=str(record["question_id"]),
                prompt=prompt(question, tokens),
                gold=tuple(answers),
                images=(record.get("image") or image_in(source, f"{name}.jpg"),),
                cluster=name,
            )
        )
    return checked(samples, path)


def prompt(question: str, tokens: str | None) -> str:
    """The official prompt. `tokens` is what the OCR system read, joined by ", ", maybe nothing; `None`: not asked."""
    return question + ("" if tokens is None else _TOKENS + tokens) + _INSTRUCTION


def read_predictions(path: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """Answers by question id, of our own file or of LLaVA's.

    LLaVA's `question_id` is the image's: its answers are joined on it and the question in the prompt, in small
    letters.

    Raises:
        DataError: a record is of no known form, or answers a question twice.
    """
    ids = {(sample.cluster, _question(sample.prompt)): sample.id for sample in samples}

    def pairs() -> Iterator[tuple[str, str]]:
        for record, where in prediction_records(path):
            id, text = answer_of(record, where)
            yield ids.get((id, _question(record.get("prompt", ""))), id), text

    return unique(pairs(), path)


def score(sample: Sample, prediction: str) -> dict[str, Verdict]:
    """The soft accuracy after the official processing, and of the answer as it was given."""
    return {OFFICIAL: soft(prediction, sample.gold), STRICT: as_given_score(prediction, sample.gold)}


def _question(text: str) -> str:
    """The question of a prompt, in small letters, as the official script joins on it."""
    return text.removesuffix(_INSTRUCTION).split(_TOKENS)[0].lower()


def _read_ocr(path: Path) -> dict[tuple[str, str], str]:
    tokens = {}
    for number, record in enumerate(read_rows(path)):
        text = require(record, ("question_id", "text"), f"{path}, row {number}")["text"]
        question, found, told = text.removesuffix(_INSTRUCTION).partition(_TOKENS)
        if not found:
            raise DataError(f"{path}, row {number}: has no line {_TOKENS.strip()!r}")
        tokens[record["question_id"], question.lower()] = told
    return tokens


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    columns = ("question_id", "image_id", "question", "answers")
    if path.suffix == ".parquet":
        for number, row in enumerate(read_parquet(path, [*columns, "ocr_tokens"], ["image"])):
            yield row, f"{path}, row {number}"
        return
    for number, record in enumerate(require(read_json(path), ("data",), str(path))["data"]):
        where = f"{path}, row {number}"
        yield require(record, columns, where), where
