"""What Prometheus is told of jobs, read from the state of record when it asks, by its index of jobs by status."""

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from basalt.api_errors import unavailable
from basalt.record.clock import now
from basalt.record.database import Sessions
from basalt.record.jobs import AT_WORK, LEASE_SECONDS, Job

STATUSES = ("queued", "validating_files", "running", "paused", "succeeded", "failed", "cancelled")
COUNTS = {"step", "steps", "done", "total", "kept", "asked", "failed"}


class Jobs(Collector):
    """The jobs of one kind."""

    def __init__(self, sessions: Sessions, kind: str) -> None:
        self._sessions, self._kind = sessions, kind

    def collect(self) -> Iterator[Metric]:
        """
        Raises:
            SQLAlchemyError: the state of record cannot be reached.
        """
        of_kind = Job.kind == self._kind
        with self._sessions() as session:
            counted = select(Job.status, func.count()).where(of_kind).group_by(Job.status)
            found: dict[str, int] = {row[0]: row[1] for row in session.execute(counted)}
            unbegun = select(now() - func.min(Job.created_at)).where(of_kind, Job.status == "queued")
            waited = session.scalar(unbegun.where(Job.started_at.is_(None)))
            at_work = session.execute(
                select(Job.id, LEASE_SECONDS - (Job.leased_until - now()), Job.progress)
                .where(of_kind, Job.status.in_(AT_WORK))
                .order_by(Job.id)
            ).all()
        jobs = GaugeMetricFamily("basalt_jobs", "Jobs by status.", labels=["kind", "status"])
        for status in STATUSES:
            jobs.add_metric([self._kind, status], found.get(status, 0))
        yield jobs
        yield self._one("basalt_jobs_waited_seconds", "That the first job waits that nobody has begun.", waited or 0)
        silent = max((seconds for _, seconds, _ in at_work), default=0)
        yield self._one("basalt_jobs_silent_seconds", "Since a worker at work was last heard of, the longest.", silent)
        progress = GaugeMetricFamily(
            "basalt_job_progress",
            "Of each job at work: step of steps, or samples done of total, which were kept, asked or failed.",
            labels=["kind", "job", "phase", "count"],
        )
        for job_id, _, told in at_work:
            for phase, counts in _phases(told):
                for name in COUNTS & counts.keys():
                    progress.add_metric([self._kind, job_id, phase, name], counts[name])
        yield progress

    def _one(self, name: str, told: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, told, labels=["kind"])
        family.add_metric([self._kind], value)
        return family


def _phases(progress: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Phase → its counts: training tells of the one it is in, evaluation of each."""
    return [(progress["phase"], progress)] if "phase" in progress else progress.items()


def router(sessions: Sessions, kind: str) -> APIRouter:
    """`GET /metrics`."""
    routes = APIRouter()
    registry = CollectorRegistry()
    registry.register(Jobs(sessions, kind))

    @routes.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        try:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
        except SQLAlchemyError:
            raise unavailable("state of record") from None

    return routes
