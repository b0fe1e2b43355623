"""What becomes of a job whose worker, or whose database, fails."""

from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from basalt.record import jobs
from basalt.record.database import Sessions, open_database
from basalt.record.jobs import Job, LeaseLost
from basalt.work import lease as leasing
from basalt.work.lease import AT_REST, Lease, Outcome, work_on


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return open_database(f"sqlite:///{tmp_path}/basalt.db")


@pytest.fixture
def job_id(sessions: Sessions) -> str:
    with sessions.begin() as session:
        return jobs.create(session, "training", {"model": "tiny"}).id


def state(sessions: Sessions, job_id: str) -> tuple[Job, str]:
    """The job, and the last event told of it."""
    with sessions() as session:
        return jobs.get(session, job_id), jobs.events_after(session, job_id, 0, 100)[-1].message


def gone() -> OperationalError:
    return OperationalError("SELECT 1", {}, Exception("the database is gone"))


def test_after_an_error_nobody_expected_the_job_is_tried_again_and_says_why(sessions: Sessions, job_id: str) -> None:
    def work(*_: object) -> Outcome:
        raise KeyError("nobody expected this")

    work_on(sessions, job_id, "one", work)
    job, told = state(sessions, job_id)
    assert (job.status, job.attempts) == ("queued", 1)
    assert told == "Its worker failed, and it is tried again. KeyError: 'nobody expected this'"


def test_a_job_at_rest_is_left_as_it_is_wanted_by_now(sessions: Sessions, job_id: str) -> None:
    def work(job: Job, _: Lease) -> Outcome:
        with sessions.begin() as session:
            jobs.ask(session, job.id, "pause")
        return AT_REST

    work_on(sessions, job_id, "one", work)
    job, told = state(sessions, job_id)
    assert (job.status, told) == ("paused", "Paused; resumed, it goes on from where it is")


def test_what_came_of_a_job_is_written_when_the_database_is_back(
    sessions: Sessions, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    release = jobs.release

    def failing(*args: object, **values: object) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise gone()
        release(*args, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "release", failing)
    monkeypatch.setattr(leasing, "AGAIN", 0.01)
    work_on(sessions, job_id, "one", lambda *_: ("succeeded", {"result": {"model": "m"}}, "Done"))
    job, told = state(sessions, job_id)
    assert (tries, job.status, told) == (3, "succeeded", "Done")


def test_a_database_that_stays_away_costs_the_lease(
    sessions: Sessions, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leasing, "AGAIN", 0.01)
    with sessions.begin() as session:
        job = jobs.claim(session, job_id, "one")
    assert job is not None
    lease = Lease(sessions, job)
    lease.lost = True

    def write() -> None:
        raise gone()

    with pytest.raises(LeaseLost, match="gone for too long"):
        lease.insist(write)
