"""A worker: `celery -A services.trainer.worker worker`, one for each GPU. See `basalt/work` and `runner.py`."""

import logging
import os
import socket

from celery.signals import setup_logging

from basalt.record.database import open_database
from basalt.work.queue import Queue, stopping
from services.trainer.runner import Runner
from services.trainer.settings import KIND, Settings

settings = Settings()
queue = Queue(KIND, settings.redis_url)
app = queue.app


@setup_logging.connect
def _log(**_: object) -> None:
    logging.basicConfig(level=logging.WARNING, format="basalt worker: %(message)s")


@app.task(name=queue.task)
def train(job_id: str) -> None:
    name = f"{socket.gethostname()}/{os.getpid()}"
    Runner(settings, open_database(settings.database), settings.open_store(), name, stopping.is_set).do(job_id)
