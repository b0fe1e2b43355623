"""One run in a process of its own, to be killed."""

import asyncio
from pathlib import Path

from basalt.eval.endpoint import Endpoint
from basalt.eval.run import Task, evaluate
from basalt.record.database import open_database


def run(url: str, data: Path, out: Path, database: str) -> None:
    asyncio.run(evaluate(Task("vqa", data, data.parent / "pictures"), Endpoint(url, "m"), out, open_database(database)))
