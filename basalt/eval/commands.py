"""`basalt eval`: `run`, `rescore`, `calibrate`, `compare-judges`, `contamination`, `gate`, `report`, `browse`,
`conformance`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from basalt.eval.asking import Price, Progress
    from basalt.eval.judge import Judge
    from basalt.eval.run import Result

STOPPED = 75  # exit code: run again to go on

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True)

Url = Annotated[str | None, typer.Option(help="an OpenAI-compatible server, with its /v1; ours by default")]
JudgeUrl = Annotated[str | None, typer.Option(help="where the judge is; BASALT_JUDGE_API_KEY has its key")]
JudgeRuns = Annotated[int, typer.Option(min=1, help="how often it grades each answer")]
Field = Annotated[list[str] | None, typer.Option(metavar="FIELD=VALUE", help="of the chat request; repeatable")]


@app.command("run")
def run(
    benchmark: Annotated[str, typer.Argument(help="mmmu, mm-vet, scienceqa, textvqa, pope; captions, vqa: your own")],
    model: Annotated[str, typer.Option(help="who is asked")],
    data: Annotated[
        str | None,
        typer.Option(
            help="its published file or folder, or a key of the object store; $BASALT_BENCHMARKS/NAME if none"
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="its pictures, a folder or tar; NAME/images beside such data")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the run's directory; var/eval/… by default")] = None,
    url: Url = None,
    blind: Annotated[bool, typer.Option("--blind", help="show no picture")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="so many samples alone, from all over it")] = None,
    decoding: Field = None,
    concurrency: Annotated[int, typer.Option(min=1, help="requests at once at most; how many is found out")] = 128,
    seconds: Annotated[float, typer.Option(min=0.1, help="that one answer may take")] = 120.0,
    price: Annotated[str | None, typer.Option(help="dollars a million tokens: PROMPT,COMPLETION")] = None,
    judge: Annotated[str | None, typer.Option(help="for mm-vet: the model that grades")] = None,
    judge_url: JudgeUrl = None,
    judge_runs: JudgeRuns = 1,
    calibration: Annotated[Path | None, typer.Option(help="of the judge, by `calibrate`", exists=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the scores as JSON")] = False,
) -> None:
    """Asks a benchmark's samples, scores the answers, and writes a report of them into the run's directory.

    Stopped, the same command goes on; nothing is asked twice.
    """

    from basalt.eval import run as running
    from basalt.eval.asking import Limits
    from basalt.eval.endpoint import Endpoint
    from basalt.eval.report import write_run_report
    from basalt.record.database import RecordSettings, open_database

    async def work(stop: Callable[[], bool]) -> Result:
        file, pictures = (await _file(data), None) if data else await asyncio.to_thread(_at_home, benchmark)
        task = running.Task(
            benchmark,
            file,
            await _file(images) if images else pictures,
            blind,
            limit,
            _fields(decoding),
        )
        name = f"{benchmark}-{model.replace('/', '_').replace('@', '-')}" + ("-blind" if blind else "")
        with _bars() as tell:
            result = await running.evaluate(
                task,
                Endpoint(url or _gateway(), model, os.environ.get("BASALT_API_KEY", ""), seconds),
                out or Path("var/eval") / name,
                open_database(RecordSettings().database),
                judge=_judge(judge, judge_url, judge_runs) if judge else None,
                calibration=calibration,
                limits=Limits(concurrency=concurrency),
                price=_price(price),
                stop=stop,
                tell=tell,
            )
        write_run_report(result.directory)
        return result

    _show(_stoppable(work), as_json)


@app.command("rescore")
def rescore_run(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="the directory of a run")],
    data: Annotated[Path | None, typer.Option(help="the benchmark's file, if it is elsewhere now")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the scores as JSON")] = False,
) -> None:
    """Scores a run's answers again, by the rules as they are now; asks nobody."""
    from basalt.eval.run import rescore

    with _told_plainly():
        _show(rescore(directory, data), as_json)


@app.command("calibrate")
def calibrate(
    data: Annotated[Path, typer.Option(help="mm-vet.json", exists=True)],
    predictions: Annotated[Path, typer.Option(help="answers that GPT-4 graded", exists=True)],
    grades: Annotated[Path, typer.Option(help="its grades: …-grade-Nruns.json", exists=True)],
    judge: Annotated[str, typer.Option(help="the model to calibrate")],
    out: Annotated[Path, typer.Option(help="the file for `run --calibration`")],
    judge_url: JudgeUrl = None,
    judge_runs: JudgeRuns = 1,
) -> None:
    """Compares a judge of MM-Vet with GPT-4's stored grades of the same answers."""

    from basalt.data.readers import DataError
    from basalt.eval import judge as judging
    from basalt.eval.mm_vet import read_predictions as read_grades
    from basalt.eval.records import read_predictions
    from basalt.eval.scoring import find
    from basalt.record.database import RecordSettings, open_database

    async def work(stop: Callable[[], bool]) -> dict[str, Any]:
        samples = find("mm-vet").read_samples(data, None)
        answers, stored = read_predictions(predictions, samples), read_grades(grades, samples)
        both = [(sample, answers[sample.id]) for sample in samples if sample.id in answers and sample.id in stored]
        chosen = _judge(judge, judge_url, judge_runs)
        with _bars() as tell:
            graded = await judging.grade(
                chosen,
                both,
                open_database(RecordSettings().database),
                stop=stop,
                tell=lambda now: tell("judging", now),
            )
        if graded.stopped:
            raise DataError(f"not every answer was judged: {graded.stopped}; run it again to go on")
        return judging.calibration(chosen, graded, stored)

    told = _stoppable(work)
    out.write_text(json.dumps(told, indent=2) + "\n")
    typer.echo(json.dumps(told["agreement"] | {"trusted": told["trusted"], "failures": told["failures"]}))


@app.command("compare-judges")
def compare_two_judges(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="the directory of a run of mm-vet")],
    second: Annotated[Path, typer.Argument(metavar="OTHER", help="of one with another judge, of the same answers")],
) -> None:
    """How two judges agree: mean error and bias, quadratic kappa, share of equal scores."""
    from dataclasses import asdict

    from basalt.eval.run import compare_judges

    with _told_plainly():
        typer.echo(json.dumps(asdict(compare_judges(first, second))))


@app.command("contamination")
def contamination(
    benchmark: Annotated[str, typer.Argument(help="as for run")],
    data: Annotated[Path, typer.Option(help="the benchmark's published file or folder")],
    images: Annotated[Path | None, typer.Option(help="its pictures, where they are beside it")] = None,
    recipe: Annotated[list[Path] | None, typer.Option(help="a training recipe: its data; repeatable")] = None,
    rows: Annotated[Path | None, typer.Option(help="training rows besides")] = None,
    rows_images: Annotated[Path | None, typer.Option(help="the pictures of those rows, a folder or tar")] = None,
    predictions: Annotated[Path | None, typer.Option(help="answers to score with and without what was found")] = None,
) -> None:
    """Looks for a benchmark's pictures and texts in training data, and scores what is clean; prints JSON."""
    from basalt.data.readers import DataError, DataSet
    from basalt.eval.contamination import check
    from basalt.eval.scoring import find, score_answers

    with _told_plainly():
        chosen = find(benchmark)
        samples = chosen.read_samples(data, images)
        training = [(str(rows), DataSet(rows, rows_images))] if rows else []
        for path in recipe or []:
            from basalt.train.recipe import load_recipe

            training += [(str(source.rows), DataSet(source.rows, source.images)) for source in load_recipe(path).data]
        if not training:
            raise DataError("say what was learned from: --recipe, or --rows")
        report = check(samples, training)
        told = report.as_json()
        if predictions is not None:
            answers = chosen.read_predictions(predictions, samples)
            clean = [sample for sample in samples if sample.id not in report.contaminated]
            told["scores"] = score_answers(benchmark, samples, answers).overall
            known = {sample.id: answers[sample.id] for sample in clean if sample.id in answers}
            told["clean_scores"] = score_answers(benchmark, clean, known).overall if clean else None
        typer.echo(json.dumps(told, ensure_ascii=False, indent=2))


@app.command("gate")
def gate(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="directories of runs")],
    against: Annotated[list[Path] | None, typer.Option(help="the run of an older version; repeatable")] = None,
    minimum: Annotated[list[str] | None, typer.Option(metavar="BENCHMARK=SCORE", help="percent; repeatable")] = None,
) -> None:
    """Exit code 1 where a version is significantly worse than an older one, under a threshold, or without a score."""
    from basalt.eval.gate import gate as check_all
    from basalt.eval.results import load_result
    from basalt.eval.tables import print_checks

    with _told_plainly():
        wanted = {name: float(value) for name, value in _fields(minimum).items()}
        checks = check_all(
            [load_result(path) for path in results], [load_result(path) for path in against or []], wanted
        )
    print_checks(checks)
    if any(check.problems for check in checks):
        raise typer.Exit(1)


@app.command("report")
def report(
    results: Annotated[list[Path] | None, typer.Argument(metavar="[RESULT]...", help="directories of runs")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="a result to compare them with; repeatable")] = None,
    quality: Annotated[Path | None, typer.Option(help="JSON: captions and drawn scenes", exists=True)] = None,
    out: Annotated[Path, typer.Option(help="the report; charts go to docs/images/eval beside it")] = Path(
        "EVAL_REPORT.md"
    ),
) -> None:
    """Writes the report: scores with their intervals beside LLaVA-1.5's, comparisons, charts, and what was not run."""
    from basalt.eval.report import write_report
    from basalt.eval.results import load_result

    with _told_plainly():
        write_report(
            [load_result(path) for path in results or []],
            out,
            against=[load_result(path) for path in against or []],
            quality=quality,
        )
    typer.echo(str(out))


@app.command("browse")
def browse(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="the directory of a run")],
    out: Annotated[Path, typer.Option(help="the folder to write; open its index.html")],
    against: Annotated[Path | None, typer.Option(help="the run of an older version: what has become wrong")] = None,
    data: Annotated[Path | None, typer.Option(help="the benchmark's file, if it is elsewhere now")] = None,
    images: Annotated[Path | None, typer.Option(help="its pictures, if they are elsewhere now")] = None,
) -> None:
    """Makes a folder to look through samples in a browser: pictures, answers, rules, and flips between versions."""
    from basalt.eval.browse import browse as write_pages
    from basalt.eval.results import load_result

    with _told_plainly():
        older = load_result(against) if against else None
        write_pages(load_result(result), out, against=older, data=data, images=images)
    typer.echo(str(out / "index.html"))


@app.command("conformance")
def conformance(
    data: Annotated[Path, typer.Option(help="the folder of public data with `golden` in it", exists=True)],
) -> None:
    """Scores LLaVA-1.5-13B's published answers; exit code 1 where a figure is not the published one."""
    from basalt.eval import conformance as conforming

    with _told_plainly():
        found = {benchmark: conforming.check(benchmark, data) for benchmark in conforming.GOLDEN}
    conforming.write_record(found)
    for benchmark, one in found.items():
        for name, expected in one.expected.items():
            told = "exact" if one.found[name] == expected else f"NOT {expected}"
            typer.echo(f"{benchmark:10} {name:28} {one.found[name]:>6}  {told}")
    if not all(one.exact for one in found.values()):
        raise typer.Exit(1)


def _show(result: Result, as_json: bool) -> None:
    scores = result.scores
    if as_json:
        typer.echo(json.dumps(scores, ensure_ascii=False))
    else:
        typer.echo(f"{scores['answered']} of {result.progress.total} answered")
        for trouble, count in scores["failures"].items():
            typer.echo(f"  {count} {trouble}")
        for way, figures in scores.get("scores", {}).items():
            typer.echo(f"{way}: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
        if scores["why"] and not result.stopped:
            typer.echo(f"{scores['status']}: {scores['why']}")
        typer.echo(str(result.directory))
    if result.stopped:
        typer.echo(f"basalt: not all was asked ({result.stopped}); the same command goes on", err=True)
        raise typer.Exit(STOPPED)
    if scores["status"] == "refused":
        raise typer.Exit(1)


def _stoppable(work: Callable[[Callable[[], bool]], Coroutine[Any, Any, T]]) -> T:
    """Runs it; Ctrl-C or SIGTERM asks it to stop, and what was answered is kept."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    with _told_plainly():
        return asyncio.run(work(asked.is_set))


@contextmanager
def _told_plainly() -> Iterator[None]:
    """An error its author foresaw is one line on stderr."""
    from sqlalchemy.exc import SQLAlchemyError

    from basalt.data.readers import DataError
    from basalt.eval.endpoint import AskError
    from basalt.object_store import StoreError

    try:
        yield
    except (AskError, DataError, StoreError, SQLAlchemyError, OSError, ValueError) as error:
        typer.echo(f"basalt: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _bars() -> Iterator[Callable[[str, Progress], None]]:
    """Progress on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[told]}"), console=Console(stderr=True)) as bars:
        shown = {}

        def tell(phase: str, now: Progress) -> None:
            if phase not in shown:
                shown[phase] = bars.add_task(phase, total=now.total, told="")
            spent = "" if now.cost is None else f", ${now.cost:.4f}"
            troubles = "".join(f", {count} {kind}" for kind, count in now.troubles.most_common(3))
            bars.update(shown[phase], completed=now.done, told=f"{now.limit} at once, {now.kept} kept{spent}{troubles}")

        yield tell


def _at_home(benchmark: str) -> tuple[Path, Path | None]:
    """A benchmark's files and pictures in the folder where benchmarks are kept: NAME, and NAME/images."""
    from basalt.data.readers import DataError

    folder = Path(os.environ.get("BASALT_BENCHMARKS", "var/benchmarks")) / benchmark
    if not folder.is_dir():
        raise DataError(f"there is no {folder}: put the benchmark's published files there, or name them with --data")
    named = [folder / name for name in ("mm-vet.json", "TextVQA_0.5.1_val.json") if (folder / name).exists()]
    images = folder / "images"
    return named[0] if named else folder, images if images.is_dir() else None


async def _file(name: str) -> Path:
    """A file or folder here, or an object of the store brought here."""
    from basalt.eval.run import fetch
    from basalt.object_store import StoreSettings

    path = Path(name)
    if await asyncio.to_thread(path.exists):
        return path
    return await fetch(name, StoreSettings().open_store(), Path("var/eval/data"))


def _judge(model: str, url: str | None, runs: int) -> Judge:
    from basalt.eval.endpoint import Endpoint
    from basalt.eval.judge import Judge

    return Judge(Endpoint(url or _gateway(), model, os.environ.get("BASALT_JUDGE_API_KEY", "")), runs)


def _gateway() -> str:
    return os.environ.get("BASALT_GATEWAY_URL", "http://127.0.0.1:8080") + "/v1"


def _price(text: str | None) -> Price | None:
    from basalt.eval.asking import Price

    if text is None:
        return None
    try:
        prompt, completion = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not PROMPT,COMPLETION") from None
    return Price(prompt, completion)


def _fields(texts: list[str] | None) -> dict[str, Any]:
    fields = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not FIELD=VALUE")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields
