"""What `basalt data check` found, for people: a table of the data sets, what was dropped and why, and the sums."""

from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from basalt.data.check import EpochReport, Report, SourceReport
from basalt.train.recipe import Recipe

FIGURES: dict[str, Callable[[SourceReport], int | None]] = {
    "rows": lambda source: source.rows,
    "usable": lambda source: source.usable,
    "dropped": lambda source: source.rows - source.usable,
    "  too long": lambda source: source.too_long,
    "  without a label": lambda source: source.unlabelled,
    "duplicates": lambda source: source.duplicates,
    "images": lambda source: source.images.distinct,
    "  missing": lambda source: source.images.missing,
    "  broken": lambda source: source.images.broken,
    "tokens, median": lambda source: source.tokens and source.tokens.median,
    "tokens, p95": lambda source: source.tokens and source.tokens.p95,
    "tokens, longest": lambda source: source.tokens and source.tokens.longest,
}


def print_report(report: Report, recipe: Recipe, console: Console) -> None:
    console.print(_table(report.sources))
    for source in report.sources:
        for lost in source.dropped:
            console.print(escape(f"{_name(source)}: {lost.count} × {lost.reason}"))
            for example in lost.examples:
                console.print(escape(f"    {example}"), highlight=False)
    if report.epoch is not None:
        console.print(_epoch(report.epoch, recipe))
    if report.memory is not None:
        memory = report.memory
        console.print(
            f"memory, an estimate without activations: {_bytes(memory.base_lm)} base LM + {_bytes(memory.trained)}"
            f" projector and LoRA in training; on disk {_bytes(memory.features_on_disk)} of tower features"
        )
    if report.measured is not None:
        measured = report.measured
        console.print(
            f"measured here: {measured.seconds_per_step:.2f} s a step, {measured.tokens_per_second:,.0f} tokens a"
            f" second, {_bytes(measured.peak_memory)} at most; its steps take"
            f" {measured.seconds / 3600:.1f} h, without tower features and grounding"
        )
    for problem in report.problems:
        console.print(f"[bold red]training would stop:[/] {escape(problem)}", highlight=False)


def _table(sources: list[SourceReport]) -> Table:
    table = Table("", *(escape(_name(source)) for source in sources), box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for title, figure in FIGURES.items():
        table.add_row(title, *(_number(figure(source)) for source in sources))
    return table


def _number(figure: int | None) -> str:
    return "–" if figure is None else f"{figure:,}"


def _name(source: SourceReport) -> str:
    return Path(source.path).name + (" (held out)" if source.held_out else "")


def _epoch(epoch: EpochReport, recipe: Recipe) -> str:
    return (
        f"an epoch: {epoch.groups:,} groups in {epoch.packed_rows:,} rows of at most {recipe.row_length} tokens"
        f" ({epoch.padding:.1%} padding), {epoch.supervised_tokens:,} of {epoch.tokens:,} tokens learned,"
        f" {epoch.steps:,} steps; the recipe's {epoch.total_steps:,} steps are {epoch.epochs:.2f} epochs"
    )


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
