"""A worker: `celery -A services.evaluator.worker worker`. See `basalt/work` and `runner.py`."""

import os
import socket

from celery.signals import setup_logging, worker_process_init

from basalt import logs, tracing
from basalt.record.database import open_database
from basalt.record.evals import KIND
from basalt.work.lease import work_on
from basalt.work.queue import Queue, stopping
from services.evaluator.runner import Attempt
from services.evaluator.settings import Settings

settings = Settings()
queue = Queue(KIND, settings.redis_url)
tracing.endpoint()  # refused here, where it would only be logged later
app = queue.app


@setup_logging.connect
def _log(**_: object) -> None:
    logs.log_to_stderr("WARNING")


@worker_process_init.connect
def _trace(**_: object) -> None:
    """Here and not before: threads do not come along when a process forks."""
    tracing.begin("eval-worker")


@app.task(name=queue.task)
def evaluate(job_id: str) -> None:
    sessions, store = open_database(settings.database), settings.open_store()
    name = f"{socket.gethostname()}/{os.getpid()}"
    work_on(
        sessions,
        job_id,
        name,
        lambda job, lease: Attempt(settings, sessions, store, job, lease, stopping.is_set).outcome(),
    )
