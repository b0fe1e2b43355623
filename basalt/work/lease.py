"""Working on a job under its lease, whatever the work is."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from basalt import tracing
from basalt.record import jobs
from basalt.record.database import Sessions
from basalt.record.jobs import Job, LeaseLost

log = logging.getLogger("basalt.work")

T = TypeVar("T")

RENEW = 8.0  # seconds
AGAIN = 1.0  # seconds between tries to reach the state of record

# A job's status now, values to write with it, the event that tells. "queued" is as is wanted of it by now, which may be
# that it is paused or cancelled; "paused" says that it cannot go on by itself.
Outcome = tuple[jobs.Status, dict[str, Any], str]
AT_REST: Outcome = "queued", {"attempts": 0}, ""  # its worker was asked to put it down
RESTING = {
    "queued": "Its worker was stopped; it goes on from where it is with another",
    "paused": "Paused; resumed, it goes on from where it is",
    "cancelled": "Cancelled",
}
UNREACHABLE = (OperationalError, InterfaceError)  # what SQLAlchemy says where the database is gone for a while


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

    def insist(self, write: Callable[[], T]) -> T:
        """Writes to the state of record, waiting where that is gone for less than the lease lasts.

        Raises:
            LeaseLost: it was gone for longer, or the job is not ours any more.
        """
        while True:
            try:
                return write()
            except UNREACHABLE as error:
                if self.lost:
                    raise LeaseLost(f"job {self._job.id}: the state of record was gone for too long") from error
                log.warning("job %s: the state of record cannot be reached: %s", self._job.id, error)
                time.sleep(AGAIN)

    def close(self) -> None:
        self._closed.set()
        self.join()


def work_on(sessions: Sessions, job_id: str, worker: str, work: Callable[[Job, Lease], Outcome]) -> None:
    """Does a job if nobody else does, and leaves the state of record saying what came of it.

    Args:
        worker: its name, told in events.
        work: may raise LeaseLost. After any other error the job is tried again.
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
            outcome = _tried(work, job, lease)
            span.told(status=outcome[0])
        lease.insist(lambda: _leave(sessions, job, outcome))
    except LeaseLost as lost:
        log.warning("%s", lost)
    finally:
        lease.close()
        tracing.flush()  # a worker's process may be ended without notice


def _tried(work: Callable[[Job, Lease], Outcome], job: Job, lease: Lease) -> Outcome:
    try:
        return work(job, lease)
    except LeaseLost:
        raise
    except Exception as error:
        log.exception("job %s", job.id)
        return "queued", {}, f"Its worker failed, and it is tried again. {type(error).__name__}: {str(error)[:300]}"


def _leave(sessions: Sessions, job: Job, outcome: Outcome) -> None:
    status, values, message = outcome
    with sessions.begin() as session:
        if status in jobs.ENDED:
            jobs.release(session, job, status, **values)
        else:
            left = jobs.put_down(session, job, pause=status == "paused", **values)
            message = message if message and left == status else f"{message} {RESTING[left]}".strip()
        jobs.add_event(session, job.id, message, level="error" if status == "failed" else "info")
