"""What a run says besides its figures: what is dropped, what is kept and why, where it goes on from.

It goes to `log`; a command shows it in the terminal, and a job's process leaves it for the worker, which tells it as
events.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("basalt.train")


class _Printed(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


class _Kept(logging.Handler):
    """One JSON object a line, its level by the names that events have."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        level = "info" if record.levelno < logging.WARNING else "warn"
        with self.path.open("a") as file:
            file.write(json.dumps({"level": level, "message": record.getMessage()}) + "\n")


def say_to(path: Path | None = None) -> None:
    """Prints what is said from now on, and where a file is named keeps it there too."""
    log.setLevel(logging.INFO)
    log.handlers = [_Printed()] if path is None else [_Printed(), _Kept(path)]


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines, if it is there, up to one that is being written or was left unfinished."""
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            return
