"""What Prometheus reads of jobs is what the state of record says of them."""

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from basalt import api_errors
from basalt.record import jobs
from basalt.record.clock import now
from basalt.record.database import Sessions, open_database
from basalt.record.jobs import Job
from basalt.work import metrics


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return open_database(f"sqlite:///{tmp_path}/basalt.db")


def scraped(sessions: Sessions, kind: str) -> dict[tuple[str, ...], float]:
    """Name and the values of its labels, by their names in order → value."""
    app = FastAPI()
    api_errors.install(app, "trainer")
    app.include_router(metrics.router(sessions, kind))
    answer = TestClient(app).get("/metrics")
    assert answer.status_code == 200
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return {(sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value for sample in samples}


def test_of_no_jobs(sessions: Sessions) -> None:
    told = scraped(sessions, "training")
    assert told["basalt_jobs", "training", "queued"] == told["basalt_jobs_waited_seconds", "training"] == 0


def test_jobs_by_status_waiting_silence_and_progress(sessions: Sessions) -> None:
    with sessions.begin() as session:
        made = [jobs.create(session, "training", {}).id for _ in range(3)]
        other = jobs.create(session, "evaluation", {}).id
        session.execute(update(Job).where(Job.id == made[2]).values(created_at=now() - 500))
    with sessions.begin() as session:
        job = jobs.claim(session, made[0], "w")
        assert job is not None
        jobs.renew(session, job, status="running", progress={"phase": "stage1", "step": 5, "steps": 20, "loss": 1.5})
        session.execute(update(Job).where(Job.id == made[0]).values(leased_until=now() - 60))
        run = jobs.claim(session, other, "w")
        assert run is not None
        asking = {"total": 30, "kept": 4, "asked": 5, "failed": 1, "done": 10, "troubles": {"429": 2}}
        jobs.renew(session, run, progress={"asking": asking})
    told = scraped(sessions, "training")
    assert told["basalt_jobs", "training", "queued"] == 2 and told["basalt_jobs", "training", "running"] == 1
    assert told["basalt_jobs_waited_seconds", "training"] == pytest.approx(500, abs=20)
    assert told["basalt_jobs_silent_seconds", "training"] == pytest.approx(90, abs=20)
    mine = {key[1:]: value for key, value in told.items() if key[0] == "basalt_job_progress"}
    assert mine == {("step", made[0], "training", "stage1"): 5, ("steps", made[0], "training", "stage1"): 20}
    told = scraped(sessions, "evaluation")
    assert told["basalt_jobs", "evaluation", "validating_files"] == 1
    assert told["basalt_jobs_silent_seconds", "evaluation"] == pytest.approx(0, abs=20)
    assert told["basalt_job_progress", "kept", other, "evaluation", "asking"] == 4
    assert sum(key[0] == "basalt_job_progress" for key in told) == 5


def test_what_has_ended_adds_no_lines(sessions: Sessions) -> None:
    before = len(scraped(sessions, "training"))
    for _ in range(50):
        with sessions.begin() as session:
            new = jobs.create(session, "training", {}).id
            job = jobs.claim(session, new, "w")
            assert job is not None
            jobs.renew(session, job, progress={"phase": "stage1", "step": 5, "steps": 20})
            jobs.release(session, job, "succeeded")
    told = scraped(sessions, "training")
    assert len(told) == before and told["basalt_jobs", "training", "succeeded"] == 50


def test_a_database_that_is_gone_is_a_503(sessions: Sessions, tmp_path: Path) -> None:
    app = FastAPI()
    api_errors.install(app, "trainer")
    app.include_router(metrics.router(sessions, "training"))
    with sessions.begin() as session:
        session.connection().exec_driver_sql("DROP TABLE job_events")
        session.connection().exec_driver_sql("DROP TABLE job_checkpoints")
        session.connection().exec_driver_sql("DROP TABLE jobs")
    assert TestClient(app).get("/metrics").status_code == 503
