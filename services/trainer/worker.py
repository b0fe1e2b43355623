"""A worker: `celery -A services.trainer.worker worker`, one for each GPU. See `basalt/work` and `runner.py`."""

import os
import socket
import subprocess
import sys

from celery.signals import celeryd_init, setup_logging, worker_process_init

from basalt import logs, tracing
from basalt.record.database import open_database
from basalt.work.queue import Queue, stopping
from services.trainer.runner import Runner
from services.trainer.settings import KIND, Settings

settings = Settings()
queue = Queue(KIND, settings.redis_url)
app = queue.app


@setup_logging.connect
def _log(**_: object) -> None:
    logs.log_to_stderr("WARNING")


@celeryd_init.connect
def _check(**_: object) -> None:
    """Ends the worker here, with one line, where every job would fail later."""
    try:
        settings.check_store()
        tracing.endpoint()
        open_database(settings.database)
        if settings.require_gpu and not sees_gpu():
            raise ValueError("BASALT_TRAINER_REQUIRE_GPU is set, and torch sees no GPU here")
    except ValueError as error:
        print(f"basalt worker: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@worker_process_init.connect
def _trace(**_: object) -> None:
    """Here and not before: threads do not come along when a process forks."""
    tracing.begin("worker")


def sees_gpu() -> bool:
    """Asked in a process of its own: one that has touched CUDA cannot fork."""
    asks = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asks]).returncode == 0


@app.task(name=queue.task)
def train(job_id: str) -> None:
    name = f"{socket.gethostname()}/{os.getpid()}"
    Runner(settings, open_database(settings.database), settings.open_store(), name, stopping.is_set).do(job_id)
