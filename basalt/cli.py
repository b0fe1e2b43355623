"""`basalt`: one command for what is not a service. Each command imports what it needs when it runs."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from basalt.eval.commands import app as evaluation
from basalt.jobs import app as jobs
from basalt.keys import app as keys
from basalt.storage import app as store
from basalt.terminal import plainly
from basalt.versions import app as models

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
train = typer.Typer(no_args_is_help=True, help="Train an assistant from a recipe.")
data = typer.Typer(no_args_is_help=True, help="Make and check training data.")
evaluate = typer.Typer(no_args_is_help=True, help="Score answers to benchmarks.")
app.add_typer(train, name="train")
app.add_typer(data, name="data")
app.add_typer(models, name="models")
evaluate.add_typer(evaluation)
app.add_typer(evaluate, name="eval")
app.add_typer(jobs, name="jobs")
app.add_typer(keys, name="keys")
app.add_typer(store, name="store")

RecipePath = Annotated[Path, typer.Argument(metavar="CONFIG", help="the recipe, a YAML file")]
RunDirectory = Annotated[Path, typer.Option("--out", help="the run's directory; an interrupted run goes on from there")]


@train.command("stage1")
def stage1(config: RecipePath, out: RunDirectory) -> None:
    """Alignment: trains the projector alone."""
    from basalt.train.stage1_align import train_stage1

    _train(train_stage1, config, out)


@train.command("stage2")
def stage2(config: RecipePath, out: RunDirectory) -> None:
    """Instruction tuning: trains projector and LoRA."""
    from basalt.train.stage2_instruct import train_stage2

    _train(train_stage2, config, out)


@data.command("check")
def check(
    config: RecipePath,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="decode every image, or see if it is there")
    ] = True,
    measure: Annotated[bool, typer.Option("--measure", help="run a few real training steps and time them")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Reads all data of a recipe first: what would be learned from, what dropped and why, and how long it takes."""
    from rich.console import Console

    from basalt.data.check import check_recipe
    from basalt.data.check_table import print_report
    from basalt.train.recipe import load_recipe

    def run() -> None:
        recipe = load_recipe(config)
        report = check_recipe(recipe, images=images, measure=measure, tell=lambda text: typer.echo(text, err=True))
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        else:
            print_report(report, recipe, Console())
        if report.problems:
            raise typer.Exit(1)

    plainly(run)


@data.command("make-scenes")
def make_scenes_command(
    emoji: Annotated[list[Path], typer.Option(help="an unpacked @iconify-json emoji package; may be given again")],
    fonts: Annotated[list[Path], typer.Option(help="a font file, or a folder of them; may be given again")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    count: Annotated[int, typer.Option(min=1, help="scenes")] = 9000,
    seed: Annotated[int, typer.Option()] = 1,
    test: Annotated[bool, typer.Option("--test", help="draw the test's layouts and words")] = False,
) -> None:
    """Draws scenes of emoji, shapes, words and charts, with questions, as LLaVA JSON.

    scenes.json has all, KIND.json those of a kind; short.json and choice.json ask the same for a word or a letter.
    """
    from basalt.data.response_formats import write_formats
    from basalt.data.scenes import make_scenes

    files = [font for path in fonts for font in (sorted(path.rglob("*.[to]tf")) if path.is_dir() else [path])]

    def make() -> None:
        rows = make_scenes(out, emoji=emoji, fonts=files, count=count, seed=seed, split="test" if test else "train")
        write_formats(out)
        typer.echo(rows)

    plainly(make)


@data.command("make-benchmarks")
def make_benchmarks_command(
    scenes: Annotated[Path, typer.Option(help="a folder of drawn scenes, of `make-scenes --test`", exists=True)],
    out: Annotated[Path, typer.Option(help="the folder to write")],
) -> None:
    """Writes drawn scenes in the forms of POPE, ScienceQA and TextVQA, to try `basalt eval` on."""
    from basalt.data.drawn_benchmarks import make_benchmarks

    plainly(lambda: typer.echo(make_benchmarks(scenes, out)))


@data.command("make-chat")
def make_chat(
    out: Annotated[Path, typer.Option(help="the folder for chat-train.json and chat-dev.json")],
    base_lm: Annotated[Path, typer.Option()] = Path("var/base/smollm2-135m-instruct"),
    held_out: Annotated[int, typer.Option(help="conversations kept for chat-dev.json")] = 60,
) -> None:
    """Lets the base LM answer text-only prompts, so that training keeps it talking."""
    from basalt.data.chat import answer_prompts, chat_prompts

    prompts = chat_prompts()
    out.mkdir(parents=True, exist_ok=True)
    plainly(lambda: answer_prompts(base_lm, prompts[:held_out], out / "chat-dev.json"))
    plainly(lambda: answer_prompts(base_lm, prompts[held_out:], out / "chat-train.json"))


@data.command("make-captions")
def make_captions(
    rows: Annotated[Path, typer.Option(help="records with `image` and `captions`, the references", exists=True)],
    images: Annotated[Path, typer.Option(help="the folder or tar of their images", exists=True)],
    out: Annotated[Path, typer.Option(help="the folder for captions.jsonl and images.tar")],
    model: Annotated[Path, typer.Option(help="the assistant that captions")] = Path("models/basalt-tiny"),
    base_lm: Annotated[Path, typer.Option()] = Path("var/base/smollm2-135m-instruct"),
    candidates: Annotated[int, typer.Option(min=1, help="of each photo; 1 is the greedy one alone")] = 4,
    count: Annotated[int | None, typer.Option(min=1, help="photos, drawn from all")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Lets an assistant caption photos itself, and keeps what agrees with their references."""
    from basalt.data.own_captions import caption_photos

    def make() -> None:
        kept = caption_photos(model, base_lm, rows, images, out, candidates=candidates, count=count, seed=seed)
        typer.echo(f"{out / 'captions.jsonl'}: {kept} photos")

    plainly(make)


@evaluate.command("score")
def score(
    benchmark: Annotated[str, typer.Argument(help="mmmu, mm-vet, scienceqa, textvqa, pope; captions, vqa: your own")],
    data: Annotated[Path, typer.Option(help="the benchmark's published file or folder")],
    predictions: Annotated[Path, typer.Option(help="the answers: JSONL of id and prediction; for mm-vet the grades")],
    intersection: Annotated[bool, typer.Option("--intersection", help="score the answered samples alone")] = False,
    max_gap: Annotated[float, typer.Option(min=0, max=1, help="the share that may be missing")] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    out: Annotated[Path | None, typer.Option(help="keep it as a run's directory, to report and compare with")] = None,
    name: Annotated[str, typer.Option(help="with --out: whose answers they are")] = "",
) -> None:
    """Scores stored answers, by the benchmark's own rules and strictly; asks no model."""
    from basalt.eval.run import Task, keep
    from basalt.eval.scoring import rescore
    from basalt.eval.tables import print_scores

    def work() -> None:
        if out is not None:
            keep(Task(benchmark, data), predictions, name or predictions.stem, out)
        scores = rescore(benchmark, data, predictions, max_gap=max_gap, intersection=intersection)
        if as_json:
            typer.echo(json.dumps(scores.as_json(), ensure_ascii=False))
        else:
            print_scores(scores)

    plainly(work)


def _train(stage: Callable[..., None], config: Path, out: Path) -> None:
    """Trains, alone or as one of the processes of `torchrun`; Ctrl-C or SIGTERM stops it with a checkpoint."""
    from basalt.train import parallel
    from basalt.train.recipe import load_recipe
    from basalt.train.said import say_to
    from basalt.train.stop import Stopped

    say_to()
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())

    def work() -> None:
        with parallel.together():
            try:
                stage(load_recipe(config), out, asked.is_set)
            except Stopped as stopped:
                typer.echo(str(stopped))
                raise typer.Exit(75) from None

    plainly(work)


if __name__ == "__main__":
    app()
