"""What a training process left in its directory: figures, logs, and the assistant it made."""

import csv
import hashlib
import io
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from basalt.object_store import ObjectStore
from basalt.train.plan import PLAN, SAID, Plan
from basalt.train.said import whole_lines

COLUMNS = ["phase", "step", "loss", "held_out_loss", "learning_rate", "tokens_per_second"]


def phases(plan: Plan) -> Iterator[tuple[str, str]]:
    """All phases in the order they are run, and their directories in the job's."""
    for stage in plan.stages:
        yield f"{stage.name} features", f"{stage.name}/features"
        if stage.name == "stage1":
            yield "grounding", "stage1/grounding"
        yield stage.name, stage.name


def lines(directory: Path, plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """(phase, figures) of all phases in the order they are run."""
    for phase, folder in phases(plan):
        for line in whole_lines(directory / folder / "log.jsonl"):
            yield phase, line


def said(directory: Path) -> list[dict[str, str]]:
    """What the process said besides its figures, as `level` and `message`."""
    return list(whole_lines(directory / SAID))


def told(phase: str, line: dict[str, Any]) -> str:
    """A line of a log in words."""
    if phase.endswith("features"):
        return f"{phase}: {line['step']} of {line['steps']} images"
    left = seconds_left(line)
    soon = f", {timedelta(seconds=round(left))} left" if left else ""
    return f"{phase}: step {line['step']} of {line['steps']}, training loss {line.get('loss', 0):.4f}{soon}"


def seconds_left(line: dict[str, Any]) -> float | None:
    """Until the phase is done, if its steps go on taking as long."""
    return (line["steps"] - line["step"]) * line["seconds_per_step"] if "seconds_per_step" in line else None


def finishes(phase: str, line: dict[str, Any], plan: Plan) -> dict[str, int | None]:
    """When the phase will be done, and when the job: None before its last phase."""
    left = seconds_left(line)
    done = None if left is None else int(time.time() + left)
    return {"phase_finish": done, "estimated_finish": done if phase == plan.stages[-1].name else None}


def metrics_at(stage: Path, step: int) -> dict[str, Any]:
    """OpenAI's names for the figures of a checkpoint."""
    found: dict[str, Any] = {}
    for line in whole_lines(stage / "log.jsonl"):
        if line["step"] <= step:
            found = line
    named = {"train_loss": found.get("loss"), "full_valid_loss": found.get("held_out_loss")}
    return {"step": step} | {name: value for name, value in named.items() if value is not None}


def trained_tokens(directory: Path, plan: Plan) -> int:
    return sum(int(line.get("tokens", 0)) for _, line in lines(directory, plan))


def files(directory: Path, log: str) -> Iterator[tuple[str, bytes]]:
    """The figures as CSV, and the log of the process."""
    plan = Plan.model_validate_json((directory / PLAN).read_text())
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for phase, line in lines(directory, plan):
        writer.writerow({"phase": phase, **line})
    yield "step_metrics.csv", table.getvalue().encode()
    yield log, (directory / log).read_bytes()


async def keep(store: ObjectStore, data: bytes) -> str:
    """Puts a file's bytes where `basalt.record.files.File.key` looks for them; returns their digest."""
    digest = hashlib.sha256(data).hexdigest()
    await store.put(f"files/sha256/{digest}", data)
    return f"sha256:{digest}"
