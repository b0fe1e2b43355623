"""POPE: does the assistant see objects that are not there? Yes or no about COCO val2014 (Li et al. 2023).

Official are the files, prompt and rules by which LLaVA-1.5 is scored (`llava/eval/eval_pope.py`, LLaVA 1.2): three
categories of questions by how the absent objects were drawn; the score is the mean of their F1. That script takes
answers in the order of the labels; here they are joined by id.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basalt.data.readers import DataError, ImageSource
from basalt.eval.benchmark import (
    OFFICIAL,
    STRICT,
    Metric,
    Reading,
    Rule,
    Sample,
    Scored,
    Verdict,
    by_group,
    mean,
    no_answer,
    share,
)
from basalt.eval.records import checked, image_in, read_parquet, read_rows, require

# LLaVA's question file numbers all three categories in one row: its answers join on these.
FIRST_ID = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}

NEGATIVE = Rule("no word", "read", "'No', 'no' or 'not' stands before the first full stop: no")
POSITIVE = Rule("'Yes' first", "read", "the answer begins with 'Yes' or 'yes': yes")
OTHERWISE = Rule("anything else is yes", "fallback", "no 'No', 'no' or 'not', nor 'yes' in front: yes all the same")
ONE_WORD = Rule("yes or no", "read", "just one of 'yes' and 'no' occurs as a word, in any case")
BOTH = Rule("yes and no", "failure", "both 'yes' and 'no' occur")
NEITHER = Rule("neither yes nor no", "failure", "neither 'yes' nor 'no' occurs")


def read_samples(path: Path, images: Path | None = None) -> list[Sample]:
    """The samples of a folder of `coco_pope_CATEGORY.json`, of one such file, or of the parquet (`lmms-lab/POPE`).

    Ids are those of LLaVA's question file: the label file's, plus 10,000,000 for random and 20,000,000 for popular.

    Raises:
        DataError: a record is not as published.
    """
    source = ImageSource(images) if images else None
    samples = []
    for record, where in _records(path):
        require(record, ("question_id", "image", "text", "label"), where)
        category, label, name = record["category"], record["label"], record["image"]
        if category not in FIRST_ID:
            raise DataError(f"{where}: no category {category!r}; there are {', '.join(sorted(FIRST_ID))}")
        if label not in ("yes", "no"):
            raise DataError(f"{where}: the label must be 'yes' or 'no', found {label!r}")
        if not str(record["question_id"]).isdecimal():
            raise DataError(f"{where}: the question_id must be a number, found {record['question_id']!r}")
        samples.append(
            Sample(
                id=str(FIRST_ID[category] + int(record["question_id"])),
                prompt=prompt(record["text"]),
                gold=(label,),
                images=(record.get("read") or image_in(source, name),),
                groups={"category": (category,)},
                cluster=name,
            )
        )
    return checked(samples, path)


def prompt(question: str) -> str:
    """The official prompt: LLaVA's `llava_pope_test.jsonl`."""
    return f"{question}\nAnswer the question using a single word or phrase."


def read_official(answer: str) -> Reading:
    """`eval_pope.py`: of what stands before the first full stop, commas dropped, split at spaces alone.

    So "NO", "nope", "" and "\\nNo" are yes, by the fallback.
    """
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    if not {"No", "not", "no"}.isdisjoint(words):
        return Reading("no", NEGATIVE)
    return Reading("yes", POSITIVE if words[0] in ("Yes", "yes") else OTHERWISE)


def read_strict(answer: str) -> Reading:
    """Just one of the words yes and no."""
    words = {"yes", "no"} & set(re.findall(r"\w+", answer.lower()))
    if len(words) == 1:
        return Reading(words.pop(), ONE_WORD)
    return Reading("", BOTH if words else no_answer(answer) or NEITHER)


def score(sample: Sample, prediction: str) -> dict[str, Verdict]:
    """A point for the label, by each way of reading."""
    readings = {OFFICIAL: read_official(prediction), STRICT: read_strict(prediction)}
    return {
        way: Verdict(float(reading.answer in sample.gold), reading.rule, reading.answer)
        for way, reading in readings.items()
    }


def measure(scored: Sequence[Scored], way: str) -> dict[str, float]:
    """F1 and the rest in percent, yes being positive, and each the mean over the categories that occur.

    What was not read counts against its row: as a miss where the label is yes, as a false alarm where it is no.
    """
    each = [_binary(members, way) for members in by_group(scored, "category").values()]
    return {name: mean(metrics[name] for metrics in each) for name in (each[0] if each else ())}


def _f1_terms(scored: Sequence[Scored], way: str) -> NDArray[np.float64]:
    """Of each sample, in the two columns of its category: what F1 divides, and by what."""
    categories = sorted(by_group(scored, "category"))
    terms = np.zeros((len(scored), 2 * len(categories)))
    for row, one in enumerate(scored):
        column = 2 * categories.index(one.sample.groups["category"][0])
        right, yes = bool(one.verdicts[way].score), one.sample.gold == ("yes",)
        terms[row, column : column + 2] = 2 * (right and yes), (yes == right) + yes  # said yes, and is yes
    return terms


def _f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return 100 * share(sums[..., ::2], sums[..., 1::2]).mean(-1)


F1 = Metric("f1", _f1_terms, _f1)


def _binary(scored: Sequence[Scored], way: str) -> dict[str, float]:
    right = {"yes": 0, "no": 0}
    wrong = {"yes": 0, "no": 0}
    for one in scored:
        (right if one.verdicts[way].score else wrong)[one.sample.gold[0]] += 1
    said_yes = right["yes"] + wrong["no"]
    metrics = {
        # 2PR / (P + R) without its division of zero by zero
        "f1": _share(2 * right["yes"], said_yes + right["yes"] + wrong["yes"]),
        "accuracy": _share(right["yes"] + right["no"], len(scored)),
        "precision": _share(right["yes"], said_yes),
        "recall": _share(right["yes"], right["yes"] + wrong["yes"]),
        "yes_ratio": _share(said_yes, len(scored)),
    }
    return {name: 100 * value for name, value in metrics.items()}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Records with the keys of the label files, `category`, and of the parquet what reads the image."""
    if path.suffix == ".parquet":
        columns = ["question_id", "question", "answer", "image_source", "category"]
        for number, row in enumerate(read_parquet(path, columns, ["image"])):
            named = {
                "text": row["question"],
                "label": row["answer"],
                "image": row["image_source"],
                "read": row["image"],
            }
            yield row | named, f"{path}, row {number}"
        return
    for file in sorted(path.glob("coco_pope_*.json")) if path.is_dir() else [path]:
        for number, record in enumerate(read_rows(file)):
            where = f"{file}, row {number}"
            yield {"category": file.stem.removeprefix("coco_pope_")} | require(record, (), where), where
