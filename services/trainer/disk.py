"""What a worker's disk holds of jobs that are over is taken away: their curves and logs stay."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import select

from basalt.record.database import Sessions
from basalt.record.files import File
from basalt.record.jobs import Job
from basalt.train.plan import PUBLISHED
from services.trainer.settings import KIND

OVER = ("succeeded", "cancelled")  # one that failed may be resumed
HEAVY = ("start", PUBLISHED, "*/checkpoints", "*/*/checkpoints", "*/lora")  # all of it is in the object store, or waste


def tidy(work: Path, sessions: Sessions) -> None:
    """Removes the checkpoints of jobs that are over, and uploaded files that no other job names.

    Args:
        work: holds a directory for each job, and `files`, the uploaded ones by digest.
    """
    with sessions() as session:
        jobs = list(session.scalars(select(Job).where(Job.kind == KIND)))
        over = {job.id for job in jobs if job.status in OVER}
        named = {name for job in jobs if job.id not in over for name in _files(job)}
        wanted = {file.digest.removeprefix("sha256:") for file in session.scalars(select(File)) if file.id in named}
    for directory in work.glob("ftjob-*"):
        if directory.name in over:
            for heavy in (path for pattern in HEAVY for path in directory.glob(pattern)):
                shutil.rmtree(heavy, ignore_errors=True)
    for directory in (work / "files").glob("*"):
        if directory.name not in wanted:
            shutil.rmtree(directory, ignore_errors=True)


def _files(job: Job) -> Iterator[str]:
    yield from re.findall(r"file-[0-9a-f]+", json.dumps(job.request))
