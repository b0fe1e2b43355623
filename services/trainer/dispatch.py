"""Puts jobs on the queue, and again where a message was lost: what is accepted is done, whatever becomes of Redis."""

import asyncio
import logging

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from basalt.record import jobs
from basalt.record.database import Sessions
from services.trainer.queue import celery, send, waiting
from services.trainer.settings import Settings

log = logging.getLogger("basalt.trainer")

KIND = "training"


class Dispatcher:
    """Sends what is to be worked on."""

    def __init__(self, settings: Settings, sessions: Sessions) -> None:
        self._seconds, self._sessions = settings.reconcile_seconds, sessions
        self._celery = celery(settings)

    async def reconcile(self) -> None:
        """Every few seconds, for ever: sends every job that nobody works on and that no message waits for."""
        while True:
            await asyncio.to_thread(self.send_all)
            await asyncio.sleep(self._seconds)

    def send_all(self) -> None:
        try:
            with self._sessions() as session:
                free = jobs.claimable(session, KIND)
            # With nothing on the queue, what was sent before was lost, or its worker died.
            lost = free and waiting(self._celery) == 0
            for job in free:
                if job.sent_at is None or lost:
                    self.send(job.id)
        except (OperationalError, RedisError, OSError) as error:
            log.warning("Redis cannot be reached; jobs wait for it: %s", error)
        except SQLAlchemyError as error:
            log.warning("the state of record cannot be reached: %s", error)

    def send(self, job_id: str) -> None:
        send(self._celery, job_id)
        with self._sessions.begin() as session:
            jobs.mark_sent(session, job_id)
