"""Runs a benchmark against an endpoint: from its published files to a directory of answers, scores and a manifest.

The directory of a run holds
    answers.jsonl   what was answered: id, prediction, and how it came about
    failures.jsonl  what was not: id, state, kind of trouble, the server's words
    grades.json     of MM-Vet, with a judge: its verdicts, in the form of the official evaluator
    manifest.json   what all that depends on, with a hash over it
    verdicts.jsonl  of each sample where it counts, and by each way of scoring the score and the rule that gave it;
                    where there are scores
    scores.json     the scores, or why there are none, with the hash of the report: the same for the same outcome
    run.json        what differs from run to run: when, how long, at what cost
    report.md       all that for people, with charts beside it (of `basalt.eval.report`)

Nothing that differs from run to run is in a hash, so that an interrupted run that was finished, a run from kept
answers, and one in one go say the same.
"""

import asyncio
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.orm import Session, sessionmaker

from basalt.data.readers import DataError
from basalt.eval import judge as judging
from basalt.eval.asking import LIMITS, Asked, Asker, Limits, Outcome, Price, Progress, Question
from basalt.eval.benchmark import Sample, Scored
from basalt.eval.endpoint import Endpoint
from basalt.eval.judge import Agreement, Grading, Judge
from basalt.eval.mm_vet import Grade
from basalt.eval.records import MAX_GAP, read_predictions
from basalt.eval.scoring import Scores, find, score_answers
from basalt.object_store import InvalidKey, ObjectNotFound, ObjectStore, check_key

JUDGED = ("mm-vet",)  # benchmarks whose answers a model grades
ANSWERS, FAILURES, GRADES = "answers.jsonl", "failures.jsonl", "grades.json"
VERDICTS, MANIFEST, SCORES, RUN = "verdicts.jsonl", "manifest.json", "scores.json", "run.json"

# Greedy, and as many tokens as LLaVA-1.5's own runs allow; of captions enough for one sentence.
MAX_TOKENS = {"mm-vet": 1024, "captions": 64}
MAX_TOKENS_ELSE = 128

Status = Literal["scored", "refused", "not judged", "judge not calibrated"]


@dataclass(frozen=True)
class Task:
    """What is to be run.

    Args:
        data: the benchmark's published file or folder.
        images: the folder or tar of its pictures, where they are not in the file.
        blind: leave the pictures out: what is answered then was not seen.
        limit: ask this many samples alone, from all over the benchmark.
        decoding: fields of the chat request that change, or add to, greedy decoding.
    """

    benchmark: str
    data: Path
    images: Path | None = None
    blind: bool = False
    limit: int | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)

    def samples(self) -> list[Sample]:
        """
        Raises:
            DataError: the files are not as published.
        """
        return self.read()[0]

    def read(self) -> tuple[list[Sample], int]:
        """The samples, and how many there are without a limit.

        Raises:
            DataError: the files are not as published.
        """
        every = find(self.benchmark).read_samples(self.data, self.images)
        chosen = every
        if self.limit is not None and self.limit < len(every):
            chosen = [every[number * len(every) // self.limit] for number in range(self.limit)]
        return [replace(sample, images=()) for sample in chosen] if self.blind else chosen, len(every)

    def full_decoding(self) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": MAX_TOKENS.get(self.benchmark, MAX_TOKENS_ELSE), **self.decoding}


@dataclass(frozen=True)
class Result:
    """What came of a run: `scores` as in scores.json, and why not every sample was asked, if so."""

    directory: Path
    scores: dict[str, Any]
    progress: Progress
    stopped: str = ""


async def evaluate(
    task: Task,
    endpoint: Endpoint,
    out: Path,
    sessions: sessionmaker[Session],
    *,
    judge: Judge | None = None,
    calibration: Path | None = None,
    limits: Limits = LIMITS,
    price: Price | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str, Progress], None] = lambda _, __: None,
) -> Result:
    """Asks, has judged where that is needed, and scores; leaves everything in the directory `out`.

    Args:
        sessions: of the state of record, where answers are kept: what is there is not asked again.
        calibration: a file that `basalt.eval.judge` made, by which the judge's numbers may be printed.
        tell: is given "asking" or "judging" with the progress.

    Raises:
        AskError: an endpoint cannot be asked.
        DataError: the benchmark's files are not as published.
    """
    began = time.time()
    samples, whole = task.read()
    decoding = task.full_decoding()
    asker = Asker(
        endpoint, decoding, sessions, limits=limits, price=price, stop=stop, tell=lambda now: tell("asking", now)
    )
    async with asker.open():
        asked = await asker.ask([Question(sample.id, sample.messages) for sample in samples])
    grading = None
    answered = [(sample, one.answer.text) for sample in samples if (one := asked.outcomes[sample.id]).answer]
    if task.benchmark in JUDGED and judge is not None and answered and not asked.stopped:
        grading = await judging.grade(
            judge,
            answered,
            sessions,
            limits=limits,
            stop=stop,
            tell=lambda now: tell("judging", now),
        )
    return _finish(out, task, samples, whole, endpoint, asked, began, judge, grading, calibration)


def rescore(directory: Path, data: Path | None = None) -> Result:
    """Scores the answers of a run's directory again, by the parsers as they are now; asks nobody.

    Args:
        data: the benchmark's file, if it is no longer where it was.

    Raises:
        DataError: the directory holds no run, or the data is not what was asked.
    """
    task, run = stored_task(directory, data)
    samples = [replace(sample, images=()) for sample in task.samples()]
    progress = Progress(len(samples), kept=len(samples))
    return Result(directory, _score(directory, task, samples), progress, run["stopped"])


def stored_task(directory: Path, data: Path | None = None, images: Path | None = None) -> tuple[Task, dict[str, Any]]:
    """What was asked in a run's directory, and its run.json.

    Args:
        data, images: the benchmark's files, if they are no longer where they were.

    Raises:
        DataError: the directory holds no run, or the data is not what was asked.
    """
    try:
        manifest, run = (json.loads((directory / name).read_text()) for name in (MANIFEST, RUN))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory} is not the directory of a run: {error}") from error
    images = images or (Path(run["images"]) if run["images"] else None)
    task = Task(manifest["benchmark"], data or Path(run["data"]), images, manifest["blind"], run["limit"])
    if digest_of(task.data) != manifest["data"]:
        raise DataError(f"{task.data} is not the data that was asked: it has changed, or is another file")
    return task, run


def keep(task: Task, predictions: Path, name: str, out: Path) -> Result:
    """Scores anybody's answers (of MM-Vet: GPT-4's stored grades) and keeps them as a run's directory.

    So they are compared with, sample by sample, as the answers of a model that was asked.

    Raises:
        DataError: a file is not as it should be.
    """
    samples, whole = task.read()
    found = find(task.benchmark).read_predictions(predictions, samples)
    out.mkdir(parents=True, exist_ok=True)
    judged = task.benchmark in JUDGED
    graded = {id: {"score": one.scores, "content": one.replies} for id, one in found.items()} if judged else {}
    _write(out / GRADES, graded)
    _write_lines(out / ANSWERS, [] if judged else [{"id": id, "prediction": text} for id, text in found.items()])
    _write_lines(out / FAILURES, [])
    manifest = {
        "benchmark": task.benchmark,
        "data": digest_of(task.data),
        "samples": len(samples),
        "blind": task.blind,
        "predictions": digest_of(predictions),
        "model": {"model": name, "version": None, "fingerprint": None},
        "judge": "stored grades" if judged else None,
    }
    run = {
        "started": time.time(),
        "data": str(task.data.resolve()),
        "images": str(task.images.resolve()) if task.images else None,
        "limit": task.limit,
        "whole": whole,
        "stopped": "",
    }
    _write(out / RUN, run)
    _write(out / MANIFEST, manifest)
    return Result(out, _score(out, task, samples), Progress(len(samples), kept=len(found)))


def compare_judges(first: Path, second: Path) -> Agreement:
    """How the judges of two runs of MM-Vet agree on the answers that both runs have.

    Raises:
        DataError: the runs have no graded answer in common.
    """
    grades = [judging.mean_scores(_read_grades(directory / GRADES)) for directory in (first, second)]
    answers = [read_predictions(directory / ANSWERS, []) for directory in (first, second)]
    same = {id for id in answers[0].keys() & answers[1].keys() if answers[0][id] == answers[1][id]}
    ours, theirs = ({id: score for id, score in scores.items() if id in same} for scores in grades)
    if not ours.keys() & theirs.keys():
        raise DataError(f"{first} and {second} have no graded answer in common")
    return judging.agreement(ours, theirs)


def read_verdicts(directory: Path) -> dict[str, dict[str, Any]]:
    """Of each scored sample of a run, by its id, what each way of scoring says."""
    lines = (directory / VERDICTS).read_text().splitlines()
    return {record["id"]: record["verdicts"] for record in map(json.loads, lines)}


async def fetch(name: str, store: ObjectStore, folder: Path) -> Path:
    """An object of the store as a file in the folder.

    Raises:
        DataError: there is none of this key.
        StoreUnavailable: the object store is not there.
    """
    try:
        key = check_key(name)
    except InvalidKey:
        raise DataError(f"{name!r} is no file here and no key of the object store") from None
    path = folder / hashlib.sha256(key.encode()).hexdigest()[:16] / Path(key).name
    await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
    try:
        await store.get_file(key, path)
    except ObjectNotFound as error:
        raise DataError(f"there is no file {name!r} here, and no such object in the object store") from error
    return path


def digest_of(path: Path) -> str:
    """sha256 of a file, or of all names and files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]:
        digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def parser_version(benchmark: str) -> str:
    """The digest of the code that reads and scores a benchmark's answers: whatever changes there changes it."""
    home = Path(__file__).parent
    chosen = sys.modules[find(benchmark).read_samples.__module__].__file__ or ""
    shared = [home / f"{name}.py" for name in ("benchmark", "letters", "records", "scoring", "vqa")]
    return _digest([path.read_text() for path in (*shared, Path(chosen))])


def _finish(
    out: Path,
    task: Task,
    samples: Sequence[Sample],
    whole: int,
    endpoint: Endpoint,
    asked: Asked,
    began: float,
    judge: Judge | None,
    grading: Grading | None,
    calibration: Path | None,
) -> Result:
    """Writes a run's directory."""
    out.mkdir(parents=True, exist_ok=True)
    _write_outcomes(out, asked.outcomes, grading)
    manifest = {
        "benchmark": task.benchmark,
        "data": digest_of(task.data),
        "samples": len(samples),
        "blind": task.blind,
        "prompts": _digest([[sample.id, sample.prompt] for sample in samples]),
        "requests": _digest([[id, outcome.key] for id, outcome in asked.outcomes.items()]),
        "decoding": task.full_decoding(),
        "model": asdict(asked.served),
        "judge": judge.as_json(grading.served) if judge and grading else None,
        "calibration": json.loads(calibration.read_text()) if calibration else None,
    }
    run = {
        "started": began,
        "seconds": time.time() - began,
        "data": str(task.data.resolve()),
        "images": str(task.images.resolve()) if task.images else None,
        "limit": task.limit,
        "whole": whole,
        "url": endpoint.url,
        "stopped": asked.stopped or (grading.stopped if grading else ""),
        "asking": _told(asked),
        "judging": grading.progress.as_json() if grading else None,
    }
    _write(out / RUN, run)
    _write(out / MANIFEST, manifest)
    return Result(out, _score(out, task, samples), asked.progress, run["stopped"])


def _score(directory: Path, task: Task, samples: Sequence[Sample]) -> dict[str, Any]:
    """Scores what is in a run's directory; completes the manifest and writes the scores."""
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest |= {"parser": parser_version(task.benchmark), "basalt": metadata.version("basalt")}
    manifest["hash"] = _digest({name: value for name, value in manifest.items() if name not in ("hash", "basalt")})
    answers = read_predictions(directory / ANSWERS, samples)
    failures = [json.loads(line) for line in (directory / FAILURES).read_text().splitlines()]
    grades = _read_grades(directory / GRADES) if task.benchmark in JUDGED else {}
    status, why, found = _scores(task.benchmark, samples, answers, failures, grades, manifest)
    scored = found.as_json() if found else {}
    outcome = {
        "manifest": manifest["hash"],
        "answers": answers,
        "failures": [[one["id"], one["state"], one["trouble"]] for one in failures],
        "grades": {id: grade.scores for id, grade in grades.items()},
        "scores": scored,
    }
    scores = {
        "status": status,
        "why": why,
        "answered": len(answers) or len(grades),
        "failures": dict(Counter(one["trouble"] or one["state"] for one in failures)),
        **({"judging": _judged(grades)} if grades else {}),
        **scored,
        "hash": _digest(outcome),
    }
    _write(directory / MANIFEST, manifest)
    _write(directory / SCORES, scores)
    _write_lines(directory / VERDICTS, [_verdicts(one) for one in (found.scored if found else [])])
    return scores


def _scores(
    benchmark: str,
    samples: Sequence[Sample],
    answers: Mapping[str, str],
    failures: Sequence[Mapping[str, str]],
    grades: Mapping[str, Grade],
    manifest: Mapping[str, Any],
) -> tuple[Status, str, Scores | None]:
    """The scores, or why there are none."""
    chosen: Mapping[str, Any] = answers
    if benchmark in JUDGED:
        if not grades:
            return "not judged", "no judge graded the answers: give one, and they are judged without being asked", None
        if (why := _uncalibrated(manifest)) is not None:
            return "judge not calibrated", why, None
        unjudged = {one["id"] for one in failures if one["state"] == "not judged"}
        if len(unjudged) > MAX_GAP * len(samples):
            return "refused", f"the judge failed on {len(unjudged)} of {len(samples)} answers: no score is known", None
        chosen, samples = grades, [sample for sample in samples if sample.id not in unjudged]
    try:
        return "scored", "", score_answers(benchmark, samples, chosen)
    except DataError as error:
        return "refused", str(error), None


def _verdicts(one: Scored) -> dict[str, Any]:
    sample = one.sample
    return {
        "id": sample.id,
        "cluster": sample.cluster,
        "groups": sample.groups,
        "gold": sample.gold,
        "verdicts": {
            way: {"score": verdict.score, "rule": verdict.rule.name, "answer": verdict.answer}
            for way, verdict in one.verdicts.items()
        },
    }


def _uncalibrated(manifest: Mapping[str, Any]) -> str | None:
    """Why a judge's numbers are not printed; `None` where they may be."""
    judge = manifest["judge"]
    if judge == "stored grades":
        return None
    calibration = manifest["calibration"]
    if calibration is None:
        return "nothing is known of how the judge agrees with GPT-4: calibrate it (`basalt eval calibrate`)"
    if any(judge[name] != calibration["judge"][name] for name in ("model", "version", "prompt", "decoding")):
        return "the calibration is of another judge, version, prompt or decoding"
    found = Agreement(**calibration["agreement"])
    if not found.trusted:
        return f"the judge does not stand for GPT-4: kappa {found.kappa:.2f}, bias {found.bias:+.3f}"
    return None


def _write_outcomes(out: Path, outcomes: Mapping[str, Outcome], grading: Grading | None) -> None:
    answers, failures = [], []
    for id, outcome in outcomes.items():
        if (answer := outcome.answer) is not None:
            told = ("key", "finish_reason", "prompt_tokens", "completion_tokens", "seconds")
            answers.append({"id": id, "prediction": answer.text} | {name: getattr(answer, name) for name in told})
        else:
            failures.append({"id": id, "state": outcome.state, "trouble": outcome.trouble, "message": outcome.message})
    if grading is not None:
        failures += [
            {"id": id, "state": "not judged", "trouble": f"judge: {trouble}", "message": ""}
            for id, trouble in grading.failures.items()
        ]
        graded = {
            id: {"model": [grading.served.model] * len(grade.scores), "content": grade.replies, "score": grade.scores}
            for id, grade in grading.grades.items()
        }
        _write(out / GRADES, graded)
    else:
        (out / GRADES).unlink(missing_ok=True)
    _write_lines(out / ANSWERS, answers)
    _write_lines(out / FAILURES, failures)


def _read_grades(path: Path) -> dict[str, Grade]:
    if not path.exists():
        return {}
    return {id: Grade(tuple(one["score"]), tuple(one["content"])) for id, one in json.loads(path.read_text()).items()}


def _judged(grades: Mapping[str, Grade]) -> dict[str, Any]:
    """How many answers were judged, and how the judge agrees with itself from run to run."""
    runs = list(zip(*(grade.scores for grade in grades.values()), strict=True))
    first = dict(zip(grades, runs[0], strict=True))
    others = [asdict(judging.agreement(first, dict(zip(grades, run, strict=True)))) for run in runs[1:]]
    return {"judged": len(grades), "runs": len(runs), "agreement_with_first_run": others}


def _told(asked: Asked) -> dict[str, Any]:
    answers = [one.answer for one in asked.outcomes.values() if one.answer]
    fingerprints = Counter(str(answer.fingerprint) for answer in answers)
    cut_off = sum(answer.finish_reason == "length" for answer in answers)
    return asked.progress.as_json() | {"fingerprints": dict(fingerprints), "cut_off": cut_off}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _write(path: Path, value: Any) -> None:
    _write_text(path, _as_text(value, indent=2) + "\n")


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    _write_text(path, "".join(_as_text(record) + "\n" for record in records))


def _as_text(value: Any, indent: int | None = None) -> str:
    """JSON that people can read; escaped where an answer has half a surrogate pair, which no file can hold."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def _write_text(path: Path, text: str) -> None:
    """Whole, or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
