"""MM-Vet: open questions that need several capabilities at once, graded by a language model (Yu et al. 2023).

What is scored here are stored grades, not answers: for each sample one grade a run of the judge. Official are the
record forms and the table of `mm-vet_evaluator.py` in the benchmark's own repository. There a judge that gave no
number in five tries is a 0.0 of the assistant's; strictly, its run does not count for that sample.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basalt.data.readers import DataError, ImageSource
from basalt.eval.benchmark import OFFICIAL, STRICT, Rule, Sample, Scored, Verdict, mean
from basalt.eval.records import checked, image_in, read_json, read_parquet, require

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")  # as its table has them, by how many samples need each

GRADED = Rule("graded", "read", "every run of the judge gave a number from 0 to 1")
JUDGE_FAILED = Rule("judge failed", "failure", "a run of the judge gave no number: 0 officially")
RUN_LEFT_OUT = Rule("failed runs left out", "fallback", "the mean of the runs whose judge gave a number")
UNGRADED = Rule("ungraded", "failure", "no run of the judge gave a number: nothing is known, it counts as 0")


@dataclass(frozen=True)
class Grade:
    """What a judge's runs gave one answer: scores from 0 to 1, and the replies they were read from."""

    scores: tuple[float, ...]
    replies: tuple[str, ...]


def read_samples(path: Path, images: Path | None = None) -> list[Sample]:
    """The samples of `mm-vet.json`, or of the parquet (`lmms-lab/MMVet`).

    Raises:
        DataError: a record is not as published.
    """
    source = ImageSource(images) if images else None
    samples = []
    for id, record, where in _records(path):
        unknown = set(record["capability"]) - set(CAPABILITIES)
        if unknown or not record["capability"]:
            raise DataError(
                f"{where}: capabilities are some of {', '.join(CAPABILITIES)}, found {record['capability']}"
            )
        capabilities = tuple(sorted(set(record["capability"]), key=CAPABILITIES.index))
        name = record["imagename"]
        samples.append(
            Sample(
                id=id,
                prompt=record["question"],  # the bare question is the official prompt
                gold=(record["answer"],),  # with its <AND> and <OR>, which the judge reads
                images=(record.get("image") or image_in(source, name),),
                groups={"capability": capabilities, "integration": ("_".join(capabilities),)},
                cluster=name,
            )
        )
    return checked(samples, path)


def read_predictions(path: Path, samples: Sequence[Sample]) -> dict[str, Grade]:
    """Grades by id, of the evaluator's own `*-grade-Nruns.json`.

    Raises:
        DataError: a grade is not of that form, or one sample has more runs than another.
    """
    grades = {}
    for id, record in require(read_json(path), (), str(path)).items():
        where = f"{path}, {id!r}"
        require(record, ("score", "content"), where)
        scores, replies = record["score"], record["content"]
        if not isinstance(scores, list) or not isinstance(replies, list):
            raise DataError(f"{where}: scores and replies are lists, one element a run; found {record}")
        if not all(isinstance(score, int | float) for score in scores):
            raise DataError(f"{where}: scores are numbers; found {scores}")
        if not scores or len(scores) != len(replies) or not all(0 <= score <= 1 for score in scores):
            raise DataError(f"{where}: needs as many scores from 0 to 1 as replies, one a run; found {record}")
        for stored, read in zip(scores, (read_grade(str(reply)) for reply in replies), strict=True):
            if read not in (None, stored):
                raise DataError(f"{where}: the judge's reply says {read}, the stored score is {stored}")
        grades[id] = Grade(tuple(map(float, scores)), tuple(map(str, replies)))
    if len(runs := {len(grade.scores) for grade in grades.values()}) > 1:
        raise DataError(f"{path}: samples have {min(runs)} to {max(runs)} runs of the judge; all need as many")
    return grades


def read_grade(reply: str) -> float | None:
    """The number that a judge's reply begins with, up to a space; `None` if it is none from 0 to 1."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def score(sample: Sample, prediction: Grade) -> dict[str, Verdict]:
    """The mean over the runs of the judge; strictly, over those that gave a number."""
    given = [value for reply in prediction.replies if (value := read_grade(reply)) is not None]
    if len(given) == len(prediction.replies):
        rules = GRADED, GRADED
    else:
        rules = JUDGE_FAILED, RUN_LEFT_OUT if given else UNGRADED
    return {
        OFFICIAL: Verdict(mean(prediction.scores), rules[0], " ".join(prediction.replies)),
        STRICT: Verdict(mean(given), rules[1], " ".join(prediction.replies)),
    }


def measure(scored: Sequence[Scored], way: str) -> dict[str, float]:
    """The mean score in percent, and officially the standard deviation over the runs of the judge."""
    figures = {"score": 100 * mean(one.verdicts[way].score for one in scored)}
    runs = run_scores(scored)
    return figures | {"std": statistics.pstdev(runs)} if way == OFFICIAL and len(runs) > 1 else figures


def run_scores(scored: Sequence[Scored]) -> list[float]:
    """The score in percent of each run of the judge, by the scores it stored; an unanswered sample has 0."""
    graded = [one.prediction for one in scored if isinstance(one.prediction, Grade)]
    runs = len(graded[0].scores) if graded else 0
    return [100 * sum(grade.scores[run] for grade in graded) / len(scored) for run in range(runs)]


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Ids and records with the keys of `mm-vet.json`; of the parquet `image` reads the picture."""
    if path.suffix == ".parquet":
        columns = ["question_id", "question", "answer", "capability"]
        for number, row in enumerate(read_parquet(path, columns, ["image"])):
            capability = [name.strip() for name in row["capability"].split(",")]
            yield (
                row["question_id"],
                row | {"capability": capability, "imagename": row["question_id"]},
                f"{path}, row {number}",
            )
        return
    for id, record in require(read_json(path), (), str(path)).items():
        where = f"{path}, {id!r}"
        yield id, require(record, ("imagename", "question", "answer", "capability"), where), where
