"""Jobs, their events and their checkpoints: what was accepted, who works on it, and what came of it.

A worker works on a job while it holds the job's *lease*: it renews it every few seconds, and one that dies stops
renewing. Every lease has a number, one higher than the last; whatever a worker writes names its own, so that one
that lost its lease without knowing (a stopped machine, a cut network) changes nothing any more.
"""

import secrets
from typing import Any, Literal

from sqlalchemy import JSON, ForeignKey, Index, case, or_, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from basalt import tracing
from basalt.record.clock import now
from basalt.record.database import Base

Status = Literal["queued", "validating_files", "running", "paused", "succeeded", "failed", "cancelled"]
ENDED = ("succeeded", "failed", "cancelled")
AT_WORK = ("validating_files", "running")

LEASE_SECONDS = 30.0
MAX_ATTEMPTS = 3  # that end without a new checkpoint


class JobError(Exception):
    """What was asked of a job cannot be done. The tree: JobError ← NoSuchJob, NotPossible, LeaseLost."""


class NoSuchJob(JobError):
    """There is no job of this id."""


class NotPossible(JobError):
    """Not in the state the job is in; the message says which."""


class LeaseLost(JobError):
    """Somebody else works on the job, or nobody is to: stop, and write nothing."""


class Job(Base):
    """One run of training or evaluation."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]  # "training" or "evaluation"
    owner: Mapped[str] = mapped_column(default="")  # the id of the API key that submitted it
    request: Mapped[dict[str, Any]] = mapped_column(JSON)  # as it was accepted
    status: Mapped[str] = mapped_column(default="queued")
    wanted: Mapped[str] = mapped_column(default="run")  # "run", "pause" or "cancel": what its worker is to do
    created_at: Mapped[float] = mapped_column(default=now())
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    progress: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # stage, step, steps, loss, …
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # code, message, param
    attempts: Mapped[int] = mapped_column(default=0)  # since its last checkpoint
    lease: Mapped[int] = mapped_column(default=0)  # the number of the last one given
    worker: Mapped[str | None]
    leased_until: Mapped[float | None]
    sent_at: Mapped[float | None]  # when it was last put on the queue
    traceparent: Mapped[str | None]  # W3C's, of the request that submitted it: every attempt is part of its trace

    __table_args__ = (Index("jobs_by_status", "kind", "status"), Index("jobs_by_time", "kind", "created_at"))


class Event(Base):
    __tablename__ = "job_events"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[float] = mapped_column(default=now())
    level: Mapped[str]  # "info", "warn" or "error"
    type: Mapped[str]  # "message" or "metrics"
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON)

    @property
    def id(self) -> str:
        return f"ftevent-{self.number}"


class Checkpoint(Base):
    __tablename__ = "job_checkpoints"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[float] = mapped_column(default=now())
    stage: Mapped[str]
    step: Mapped[int]
    key: Mapped[str]  # in the object store
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)

    @property
    def id(self) -> str:
        return f"ftckpt-{self.number}"


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def create(session: Session, kind: str, request: dict[str, Any], *, owner: str = "") -> Job:
    new = new_id("ftjob" if kind == "training" else "evalrun")
    job = Job(id=new, kind=kind, request=request, owner=owner, traceparent=tracing.headers().get("traceparent"))
    session.add(job)
    session.flush()
    add_event(session, job.id, "Created")
    return job


def get(session: Session, job_id: str) -> Job:
    """
    Raises:
        NoSuchJob: there is none of this id.
    """
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise NoSuchJob(f"there is no job {job_id!r}")
    return job


def add_event(
    session: Session, job_id: str, message: str, *, level: str = "info", data: dict[str, Any] | None = None
) -> None:
    """Tells something about a job; with `data` it is a measurement."""
    kind = "message" if data is None else "metrics"
    session.add(Event(job_id=job_id, level=level, type=kind, message=message, data=data))


def events_after(session: Session, job_id: str, number: int, limit: int) -> list[Event]:
    """The events of a job in order, from the one after `number`."""
    wanted = select(Event).where(Event.job_id == job_id, Event.number > number).order_by(Event.number).limit(limit)
    return list(session.scalars(wanted))


def metrics(session: Session, job_id: str) -> list[dict[str, Any]]:
    """The measurements told of a job so far, in order."""
    told = select(Event.data).where(Event.job_id == job_id, Event.type == "metrics").order_by(Event.number)
    return [data for data in session.scalars(told) if data is not None]


# What a client asks for


def ask(session: Session, job_id: str, wanted: Literal["run", "pause", "cancel"]) -> Job:
    """Has a job run, paused or cancelled: at once where nobody works on it, else by its worker, soon.

    One that has failed may be run again: it goes on from its last checkpoint.

    Raises:
        NoSuchJob: there is none of this id.
        NotPossible: it has ended already.
    """
    at_rest = {"run": "queued", "pause": "paused", "cancel": "cancelled"}[wanted]
    resting = Job.status.not_in(AT_WORK)
    over = ("succeeded", "cancelled") if wanted == "run" else ENDED
    changed = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status.not_in(over))
        .values(
            wanted=wanted,
            status=case((resting, at_rest), else_=Job.status),
            finished_at=case((resting, now()), else_=None) if wanted == "cancel" else None,
            error=None,
            sent_at=None,
            attempts=0,
        )
    )
    job = get(session, job_id)
    if _rows(changed) == 0:
        raise NotPossible(f"job {job_id} has {job.status}: it can no longer be changed")
    told = {"run": "Asked to run", "pause": "Asked to pause", "cancel": "Asked to stop for good"}[wanted]
    add_event(session, job_id, told if job.status in AT_WORK else {"run": "Queued"}.get(wanted, job.status.title()))
    return job


def mark_sent(session: Session, job_id: str) -> None:
    """A message for the job is on the queue."""
    session.execute(update(Job).where(Job.id == job_id).values(sent_at=now()))


# What a worker does


def claimable(session: Session, kind: str) -> list[Job]:
    """Jobs nobody works on and somebody should, the oldest first."""
    wanted = select(Job).where(Job.kind == kind, _free()).order_by(Job.created_at)
    return list(session.scalars(wanted))


def claim(session: Session, job_id: str, worker: str) -> Job | None:
    """Takes the lease of a job; None where it is not to be had: it is held, paused or ended."""
    given = session.execute(
        update(Job)
        .where(Job.id == job_id, _free())
        .values(
            worker=worker,
            lease=Job.lease + 1,
            leased_until=now() + LEASE_SECONDS,
            attempts=Job.attempts + 1,
            started_at=case((Job.started_at.is_(None), now()), else_=Job.started_at),
            status="validating_files",
        )
    )
    return get(session, job_id) if _rows(given) else None


def renew(session: Session, job: Job, **values: Any) -> str:
    """Keeps a lease for another `LEASE_SECONDS` and writes the job's `values` (status, progress, …).

    Returns:
        What is wanted of the job by now: "run", "pause" or "cancel".

    Raises:
        LeaseLost: it is not ours any more.
    """
    _write(session, job, leased_until=now() + LEASE_SECONDS, **values)
    return get(session, job.id).wanted


def release(session: Session, job: Job, status: Status, **values: Any) -> None:
    """Gives a lease back and leaves the job in `status`.

    Raises:
        LeaseLost: it is not ours any more.
    """
    ended = {"finished_at": now()} if status in ENDED else {}
    _write(session, job, status=status, worker=None, leased_until=None, sent_at=None, **ended, **values)


def put_down(session: Session, job: Job, *, pause: bool = False, **values: Any) -> Status:
    """Gives a lease back and leaves the job as it is wanted by now: queued, paused or cancelled, which is returned.

    Args:
        pause: it cannot go on until somebody resumes it.

    Raises:
        LeaseLost: it is not ours any more.
    """
    running: Status = "paused" if pause else "queued"
    wanted = {"wanted": case((Job.wanted == "run", "pause"), else_=Job.wanted)} if pause else {}
    _write(
        session,
        job,
        status=case((Job.wanted == "cancel", "cancelled"), (Job.wanted == "pause", "paused"), else_=running),
        finished_at=case((Job.wanted == "cancel", now()), else_=None),
        worker=None,
        leased_until=None,
        sent_at=None,
        **wanted,
        **values,
    )
    return get(session, job.id).status  # type: ignore[return-value]


def add_checkpoint(session: Session, job: Job, checkpoint: Checkpoint) -> None:
    """Records a checkpoint that is in the object store.

    Raises:
        LeaseLost: the job is not ours any more.
    """
    _write(session, job, attempts=0)
    session.add(checkpoint)


def checkpoints(session: Session, job_id: str, stage: str) -> list[Checkpoint]:
    """Those of a stage that are in the object store, the oldest first."""
    of_stage = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.stage == stage)
    return list(session.scalars(of_stage.order_by(Checkpoint.step, Checkpoint.number)))


def last_checkpoint(session: Session, job_id: str, stage: str) -> Checkpoint | None:
    return next(reversed(checkpoints(session, job_id, stage)), None)


def _write(session: Session, job: Job, **values: Any) -> None:
    mine = update(Job).where(Job.id == job.id, Job.lease == job.lease, Job.status.in_(AT_WORK))
    if _rows(session.execute(mine.values(**values))) == 0:
        raise LeaseLost(f"job {job.id} is no longer this worker's: lease {job.lease} is over")


def _free() -> Any:
    """Queued, or at work by a worker that has not been heard of for longer than its lease."""
    return or_(Job.status == "queued", (Job.status.in_(AT_WORK)) & (Job.leased_until < now()))


def _rows(result: Any) -> int:
    return result.rowcount
