"""What a phase tells as it goes: lines of JSON in `log.jsonl`, curves, a bar in a terminal."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from basalt.train import parallel
from basalt.train.curves import open_curves
from basalt.train.said import whole_lines

EVERY = 20  # steps
LOOKS_EVERY = 20.0  # seconds
LOG = "log.jsonl"


@dataclass(frozen=True)
class Tally:
    """What one step adds to the figures. Numerators may be tensors, so that no step waits for the device."""

    means: Mapping[str, tuple[Tensor | float, float]]  # name → (sum, over how many)
    tokens: int  # that were run through the model, padding left out
    seconds_at_peak: float = 0.0  # what this process's operations would take at its device's peak; 0: not known


class Telling:
    """A phase's own log, continued where a resumed run goes on: what came after that step is told again.

    Args:
        leading: whether this process is the one that writes; of several that train together the first does.
    """

    def __init__(self, directory: Path, name: str, first: int, steps: int, *, leading: bool) -> None:
        self.name, self.path, self.steps, self.leading = name, directory / LOG, steps, leading
        self._sums: dict[str, tuple[Tensor | float, float]] = {}
        self._tokens, self._at_peak, self._steps, self._began = 0, 0.0, 0, time.monotonic()
        if not leading:
            return
        directory.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(directory) if line["step"] <= first]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._curves = open_curves(directory, first)
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
        )
        self._bar = Progress(*columns, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task(name, total=steps, completed=first, told="")

    def __enter__(self) -> "Telling":
        if self.leading:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.leading:
            self._bar.stop()
            for curves in self._curves:
                curves.close()

    def add(self, tally: Tally) -> None:
        for name, (total, count) in tally.means.items():
            before, seen = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = before + total, seen + count
        self._tokens += tally.tokens
        self._at_peak += tally.seconds_at_peak
        self._steps += 1
        if self.leading:
            self._bar.advance(self._task)

    def tell(self, step: int, samples: Sequence[dict[str, str]] = (), **figures: float) -> None:
        """Writes the means since the last time, of all processes, `figures`, and sampled answers; begins anew."""
        sums = parallel.added_up([float(total) for total, _ in self._sums.values()])
        *counts, tokens = parallel.added_up([*(count for _, count in self._sums.values()), self._tokens])
        if not self.leading:
            return
        seconds = max(time.monotonic() - self._began, 1e-9)
        line: dict[str, Any] = {"step": step, "steps": self.steps, "tokens": round(tokens)}
        line |= {name: total / max(count, 1) for name, total, count in zip(self._sums, sums, counts, strict=True)}
        line |= {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / max(self._steps, 1)}
        if self._at_peak:
            line["mfu"] = self._at_peak / seconds
        line |= {"memory_gib": memory_held() / 2**30, **figures}
        line = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in line.items()}
        for number, sample in enumerate(samples):
            text = f"{sample['question']}\n\n**{sample['answer']}**\n\n({sample['expected']})"
            for curves in self._curves:
                curves.text(step, f"sample {number}", text)
        line |= {"samples": list(samples)} if samples else {}
        with self.path.open("a") as log:
            log.write(json.dumps(line) + "\n")
        told = {name: value for name, value in line.items() if name not in ("step", "steps", "samples")}
        for curves in self._curves:
            curves.figures(step, told)
        self._bar.update(self._task, told=f"loss {line.get('loss', 0):.3f}")
        if self._bar.disable:
            print(f"{self.name}: {json.dumps(line)}", flush=True)
        self.begin()

    def begin(self) -> None:
        """Forgets what was added: time that was not spent on steps is not to be counted."""
        self._sums, self._tokens, self._at_peak, self._steps, self._began = {}, 0, 0.0, 0, time.monotonic()


class Looking:
    """Told how many images the tower has seen: a bar in a terminal, and now and then a line of a log."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG
        columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, disable=not sys.stderr.isatty())
        self._task: TaskID | None = None
        self._told, self._told_at = 0, 0.0

    def __enter__(self) -> "Looking":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, seen: int, of: int) -> None:
        if self._task is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._bar.start()
            self._task = self._bar.add_task("features", total=of)
            self._told, self._told_at = seen, time.monotonic()  # a run that goes on has seen many before
        self._bar.update(self._task, completed=seen)
        seconds = time.monotonic() - self._told_at
        if seconds < LOOKS_EVERY and seen < of:
            return
        line: dict[str, Any] = {"step": seen, "steps": of}
        if seen > self._told:
            line["images_per_second"] = float(f"{(seen - self._told) / seconds:.6g}")
        with self.path.open("a") as log:
            log.write(json.dumps(line) + "\n")
        if self._bar.disable:
            print(f"features: {json.dumps(line)}", flush=True)
        self._told, self._told_at = seen, time.monotonic()


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The lines of a phase's log; one that a killed process left unfinished is left out."""
    return list(whole_lines(directory / LOG))


def memory_held() -> int:
    """Bytes: the most that was held of the GPU, where it trains on one, else what this process holds now.

    Files it reads in place are not counted: the system keeps of features in memory what there is room for.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
