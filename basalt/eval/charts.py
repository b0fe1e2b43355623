"""Charts of scores by group, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from basalt.eval.uncertainty import Interval

# Okabe and Ito's palette, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_groups(
    path: Path,
    title: str,
    groups: Sequence[str],
    of: Mapping[str, Mapping[str, Interval]],
    axis: str,
) -> None:
    """A dot with its interval for each group and model, groups from top to bottom in the order given.

    Args:
        of: of each model its intervals by group; a group may be absent.
    """
    figure = Figure(figsize=(8, 1.3 + 0.24 * len(groups) * max(1, 0.6 * len(of))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    step = 0.7 / max(len(of), 1)
    for number, (name, found) in enumerate(of.items()):
        places = [row + step * (number - (len(of) - 1) / 2) for row, group in enumerate(groups) if group in found]
        known = [found[group] for group in groups if group in found]
        values = [one.value for one in known]
        reach = [[one.value - one.low for one in known], [one.high - one.value for one in known]]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.errorbar(values, places, xerr=reach, fmt="o", ms=4, lw=1.4, color=colour, label=name)
    axes.set_yticks(range(len(groups)), [group.replace("_", " ") for group in groups], fontsize=9)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(-2, 102)
    axes.set_xlabel(axis)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="x", color="#dddddd", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if of:
        figure.legend(loc="outside lower left", ncols=min(len(of), 3), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
