"""Scores as tables for a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from basalt.eval.gate import Check
from basalt.eval.scoring import Figures, Scores


def print_scores(scores: Scores) -> None:
    """Prints scores overall and by group, which rules decided, and where the ways of scoring differ."""
    console = Console()
    for table in (_figures(scores), _rules(scores), _differences(scores)):
        if table.row_count:
            console.print(table)
    for ids, what in (
        (scores.gaps.missing, "samples without an answer"),
        (scores.gaps.unknown, "answers to no sample"),
    ):
        if ids:
            console.print(f"{len(ids)} {what}: {', '.join(ids[:10])}{', …' if len(ids) > 10 else ''}", markup=False)


def print_checks(checks: Sequence[Check]) -> None:
    """Prints what a gate found: a row a result, then what is wrong."""
    console = Console()
    table = Table("benchmark", "model", "score", "older", "difference", "p", "")
    for check in checks:
        compared, found = check.comparison, check.score
        table.add_row(
            check.result.benchmark,
            escape(check.result.name),
            f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]" if found else "",
            f"{compared.first:.1f} ({escape(check.against.name)})" if compared and check.against else "",
            f"{compared.difference.value:+.1f} [{compared.difference.low:+.1f}, {compared.difference.high:+.1f}]"
            if compared
            else "",
            f"{check.p:.2g}" if check.p is not None else "",
            "[bold red]fails[/]" if check.problems else "[green]passes[/]",
        )
    console.print(table)
    for check in checks:
        for problem in check.problems:
            console.print(f"{check.result.benchmark}, {check.result.name}: {problem}", markup=False, soft_wrap=True)


def _figures(scores: Scores) -> Table:
    ways = list(scores.overall)
    metrics = list(dict.fromkeys(metric for figures in scores.overall.values() for metric in figures))
    table = Table(title=f"{scores.benchmark}, {len(scores.scored):,} samples, in percent", title_justify="left")
    table.add_column("")
    table.add_column("samples", justify="right")
    for way in ways:
        table.add_column(way, justify="right")
    for metric in metrics:
        table.add_row(metric, f"{len(scores.scored):,}", *(_cell(scores.overall, way, metric) for way in ways))
    for kind, members in scores.groups.items():
        table.add_section()
        table.add_row(f"[bold]{metrics[0]} by {kind}[/bold]")
        for name, (count, figures) in members.items():
            table.add_row(f"  {name}", f"{count:,}", *(_cell(figures, way, metrics[0]) for way in ways))
    return table


def _cell(figures: Figures, way: str, metric: str) -> str:
    return f"{figures[way][metric]:.1f}" if metric in figures[way] else ""


def _rules(scores: Scores) -> Table:
    table = Table("scoring", "rule", "kind", "count", "share", "meaning", title="Which rules decided")
    for way in scores.overall:
        table.add_section()
        for rule, count in scores.rules(way).most_common():
            share = f"{count / len(scores.scored):.1%}"
            table.add_row(way, rule.name, rule.kind, f"{count:,}", share, rule.meaning)
    return table


def _differences(scores: Scores) -> Table:
    table = Table("official", "strict", "samples", title="Where official and strict differ, by their rules")
    for (official, strict), count in scores.differences().most_common():
        table.add_row(official, strict, f"{count:,}")
    return table
