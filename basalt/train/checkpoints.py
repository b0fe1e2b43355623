"""Checkpoints of one stage of a run: files that name their own digest, written whole or not at all.

`checkpoints/step-00000400.<sha256>.pt`: one rename puts state and digest in place together, so that whenever the
process dies, what lies there under this name is whole, and what a failing disk or a broken copy made of it is told.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from basalt.train.said import log

NAME = re.compile(r"step-(\d{8})\.([0-9a-f]{64})\.pt")
KEPT = 2  # the last ones; the best by held-out loss is kept besides


class CheckpointError(RuntimeError):
    """A checkpoint is needed and there is no whole one."""


@dataclass(frozen=True)
class Saved:
    path: Path
    step: int
    digest: str  # hex of the file's sha256


def saved(directory: Path) -> list[Saved]:
    """The checkpoints of a stage's directory, the oldest first."""
    found = []
    for path in (directory / "checkpoints").glob("step-*.pt"):
        if match := NAME.fullmatch(path.name):
            found.append(Saved(path, int(match[1]), match[2]))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save(directory: Path, step: int, state: dict[str, Any]) -> Saved:
    """Writes `state` after `step` steps.

    Raises:
        OSError: it cannot be written, as on a full disk; what was written of it is gone.
    """
    folder = directory / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "unfinished"
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)  # it takes the room that is short
        hidden = error.__context__  # torch's writer tells a full disk as a RuntimeError of its own
        raise (hidden if isinstance(hidden, OSError) else error) from None
    digest = file_digest(partial)
    path = folder / f"step-{step:08d}.{digest}.pt"
    partial.replace(path)
    return Saved(path, step, digest)


def prune(directory: Path, best_step: int | None) -> None:
    """Removes all checkpoints but the last `KEPT` and the best one."""
    for checkpoint in saved(directory)[:-KEPT]:
        if checkpoint.step != best_step:
            checkpoint.path.unlink(missing_ok=True)


def load_last(directory: Path) -> dict[str, Any] | None:
    """The state of the last whole checkpoint, or None where none was written yet.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    checkpoints = saved(directory)
    for checkpoint in reversed(checkpoints):
        if file_digest(checkpoint.path) == checkpoint.digest:
            return torch.load(checkpoint.path, map_location="cpu", weights_only=True)  # it may be of a GPU
        log.warning(
            f"{checkpoint.path} is damaged: its contents are not of the digest in its name; trying the one before"
        )
    if checkpoints:
        raise CheckpointError(f"every checkpoint in {directory / 'checkpoints'} is damaged: remove them to start again")
    return None


def is_complete(directory: Path) -> bool:
    """Whether a stage was trained to its end.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    state = load_last(directory)
    return state is not None and state["step"] == state.get("steps")


def learned(directory: Path) -> dict[str, Any]:
    """The last checkpoint of a run: `projector` and `standardizer`, float32, and what its training needed besides.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: all there are are damaged.
    """
    state = load_last(directory)
    if state is None:
        raise FileNotFoundError(f"{directory} holds no run of `basalt train`: it has no checkpoint")
    return state


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
