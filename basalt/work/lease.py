"""Working on a job under its lease, whatever the work is."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from basalt import tracing
from basalt.record import jobs
from basalt.record.database import Sessions
from basalt.record.jobs import Job, LeaseLost

log = logging.getLogger("basalt.work")

RENEW = 8.0  # seconds

Outcome = tuple[jobs.Status, dict[str, Any], str]  # a job's status now, values to write with it, the event that tells


class Lease(threading.Thread):
    """Renews a job's lease until closed.

    Attributes:
        wanted: what is wanted of the job.
        lost: somebody else has the job, or the state of record could not be reached for as long as a lease lasts.
    """

    def __init__(self, sessions: Sessions, job: Job) -> None:
        super().__init__(daemon=True)
        self._sessions, self._job = sessions, job
        self._closed = threading.Event()
        self.wanted, self.lost = job.wanted, False
        self._write = threading.Lock()

    def run(self) -> None:
        renewed = time.monotonic()
        while not self._closed.wait(RENEW):
            try:
                self.renew()
                renewed = time.monotonic()
            except LeaseLost:
                self.lost = True
            except SQLAlchemyError as error:
                log.warning("job %s: the state of record cannot be reached: %s", self._job.id, error)
                self.lost = time.monotonic() - renewed > jobs.LEASE_SECONDS - RENEW
            if self.lost:
                return

    def renew(self, **values: Any) -> None:
        """Renews now, and writes `values` of the job.

        Raises:
            LeaseLost: it is not ours any more.
        """
        with self._write, self._sessions.begin() as session:
            self.wanted = jobs.renew(session, self._job, **values)

    def close(self) -> None:
        self._closed.set()
        self.join()


def work_on(sessions: Sessions, job_id: str, worker: str, work: Callable[[Job, Lease], Outcome]) -> None:
    """Does a job if nobody else does, and leaves the state of record saying what came of it.

    Args:
        worker: its name, told in events.
        work: may raise LeaseLost.
    """
    with sessions.begin() as session:
        job = jobs.claim(session, job_id, worker)
    if job is None:
        return
    lease = Lease(sessions, job)
    lease.start()
    submitted = {"traceparent": job.traceparent} if job.traceparent else {}
    try:
        with tracing.span(job.kind, "consumer", submitted, job=job.id, worker=worker, attempt=job.attempts) as span:
            status, values, message = work(job, lease)
            span.told(status=status)
        lease.close()
        with sessions.begin() as session:
            jobs.release(session, job, status, **values)
            jobs.add_event(session, job.id, message, level="error" if status == "failed" else "info")
    except LeaseLost as lost:
        log.warning("%s", lost)
    finally:
        lease.close()
        tracing.flush()  # a worker's process may be ended without notice
