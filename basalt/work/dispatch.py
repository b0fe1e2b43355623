"""Puts jobs on the queue, and again where a message was lost: what is accepted is done, whatever becomes of Redis."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from basalt.record import jobs
from basalt.record.database import Sessions
from basalt.work.queue import Queue

log = logging.getLogger("basalt.dispatch")


class Dispatcher:
    """Sends what is to be worked on.

    Args:
        seconds: between looks for jobs that nobody works on.
    """

    def __init__(self, queue: Queue, sessions: Sessions, seconds: float) -> None:
        self._queue, self._sessions, self._seconds = queue, sessions, seconds

    @asynccontextmanager
    async def reconciling(self) -> AsyncIterator[None]:
        """Meanwhile sends, every few seconds, every job that nobody works on and that no message waits for."""
        task = asyncio.create_task(self._reconcile())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _reconcile(self) -> None:
        while True:
            await asyncio.to_thread(self._send_all)
            await asyncio.sleep(self._seconds)

    def _send_all(self) -> None:
        try:
            with self._sessions() as session:
                free = jobs.claimable(session, self._queue.kind)
            # With nothing on the queue, what was sent before was lost, or its worker died.
            lost = free and self._queue.waiting() == 0
            for job in free:
                if job.sent_at is None or lost:
                    self._send(job.id)
        except (OperationalError, RedisError, OSError) as error:
            log.warning("Redis cannot be reached; jobs wait for it: %s", error)
        except SQLAlchemyError as error:
            log.warning("the state of record cannot be reached: %s", error)

    def send(self, job_id: str) -> None:
        """Sends a job that was just accepted; without Redis it is sent when that is back."""
        with suppress(OperationalError, OSError):
            self._send(job_id)

    def _send(self, job_id: str) -> None:
        self._queue.send(job_id)
        with self._sessions.begin() as session:
            jobs.mark_sent(session, job_id)
