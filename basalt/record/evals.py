"""Evals: what is evaluated and how it is graded. Each run of one is a job of the kind "evaluation"."""

from typing import Any

from sqlalchemy import JSON, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from basalt.record import jobs
from basalt.record.clock import now
from basalt.record.database import Base
from basalt.record.jobs import Job

KIND = "evaluation"


class NoSuchEval(Exception):
    """There is no eval, or no run of it, of this id."""


class Eval(Base):
    __tablename__ = "evals"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(default="")
    request: Mapped[dict[str, Any]] = mapped_column(JSON)  # as it was accepted
    created_at: Mapped[float] = mapped_column(default=now())


def create_eval(session: Session, request: dict[str, Any], *, owner: str = "") -> Eval:
    made = Eval(id=jobs.new_id("eval"), request=request, owner=owner)
    session.add(made)
    session.flush()
    session.refresh(made)
    return made


def get_eval(session: Session, eval_id: str) -> Eval:
    """
    Raises:
        NoSuchEval: there is none of this id.
    """
    found = session.get(Eval, eval_id)
    if found is None:
        raise NoSuchEval(f"there is no eval {eval_id!r}")
    return found


def create_run(session: Session, eval_id: str, request: dict[str, Any], *, owner: str = "") -> Job:
    """A run of an eval, queued."""
    job = jobs.create(session, KIND, request | {"eval": eval_id}, owner=owner)
    return jobs.get(session, job.id)


def get_run(session: Session, eval_id: str, run_id: str) -> Job:
    """
    Raises:
        NoSuchEval: the eval has no run of this id.
    """
    job = session.get(Job, run_id, populate_existing=True)
    if job is None or job.kind != KIND or job.request["eval"] != eval_id:
        raise NoSuchEval(f"the eval {eval_id!r} has no run {run_id!r}")
    return job


def runs_of(session: Session, eval_id: str, *, newest_first: bool) -> list[Job]:
    order = (Job.created_at.desc(), Job.id.desc()) if newest_first else (Job.created_at, Job.id)
    wanted = select(Job).where(Job.kind == KIND, Job.request["eval"].as_string() == eval_id)
    return list(session.scalars(wanted.order_by(*order)))
