"""Jobs and their leases, on a real database."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from basalt.record import jobs
from basalt.record.clock import now
from basalt.record.database import Sessions, open_database
from basalt.record.jobs import Job, JobError, LeaseLost, NoSuchJob, NotPossible


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[Sessions]:
    yield open_database(f"sqlite:///{tmp_path}/basalt.db")


def made(sessions: Sessions) -> str:
    with sessions.begin() as session:
        return jobs.create(session, "training", {"model": "tiny"}).id


def claimed(sessions: Sessions, job_id: str, worker: str = "one") -> Job | None:
    with sessions.begin() as session:
        return jobs.claim(session, job_id, worker)


def status(sessions: Sessions, job_id: str) -> str:
    with sessions() as session:
        return jobs.get(session, job_id).status


def expire(sessions: Sessions, job_id: str) -> None:
    with sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(leased_until=now() - 1))


def test_of_many_workers_one_gets_the_job(sessions: Sessions) -> None:
    job_id = made(sessions)
    with ThreadPoolExecutor(8) as pool:
        got = [job for job in pool.map(lambda n: claimed(sessions, job_id, f"worker {n}"), range(16)) if job]
    assert len(got) == 1
    assert got[0].lease == 1


def test_who_lost_the_lease_writes_nothing(sessions: Sessions) -> None:
    job_id = made(sessions)
    first = claimed(sessions, job_id)
    assert first is not None
    assert claimed(sessions, job_id, "two") is None
    expire(sessions, job_id)
    second = claimed(sessions, job_id, "two")
    assert second is not None and second.lease == 2
    checkpoint = jobs.Checkpoint(job_id=job_id, stage="stage1", step=1, key="k", metrics={})
    for write in (
        lambda session: jobs.renew(session, first, progress={"step": 9}),
        lambda session: jobs.release(session, first, "succeeded"),
        lambda session: jobs.add_checkpoint(session, first, checkpoint),
    ):
        with pytest.raises(LeaseLost), sessions.begin() as session:
            write(session)
    with sessions.begin() as session:
        assert jobs.renew(session, second, progress={"step": 3}) == "run"
    with sessions() as session:
        assert jobs.get(session, job_id).progress == {"step": 3}
        assert jobs.last_checkpoint(session, job_id, "stage1") is None


def test_a_resting_job_obeys_at_once_and_a_running_one_by_its_worker(sessions: Sessions) -> None:
    job_id = made(sessions)
    with sessions.begin() as session:
        assert jobs.ask(session, job_id, "pause").status == "paused"
        assert jobs.claimable(session, "training") == []
        assert jobs.ask(session, job_id, "run").status == "queued"
    job = claimed(sessions, job_id)
    assert job is not None
    with sessions.begin() as session:
        assert jobs.ask(session, job_id, "cancel").status == "validating_files"
        assert jobs.renew(session, job) == "cancel"
        jobs.release(session, job, "cancelled")
    with sessions() as session:
        ended = jobs.get(session, job_id)
        assert ended.finished_at is not None and ended.finished_at >= ended.created_at
    with pytest.raises(NotPossible, match="has cancelled"), sessions.begin() as session:
        jobs.ask(session, job_id, "run")
    with pytest.raises(NoSuchJob), sessions.begin() as session:
        jobs.ask(session, "ftjob-0", "run")


def test_what_was_asked_last_holds_when_a_job_is_put_down(sessions: Sessions) -> None:
    job_id = made(sessions)
    job = claimed(sessions, job_id)
    assert job is not None
    with sessions.begin() as session:
        jobs.ask(session, job_id, "pause")
        assert jobs.renew(session, job) == "pause"
        jobs.ask(session, job_id, "run")  # its worker knows of the pause alone
        assert jobs.put_down(session, job) == "queued"
    job = claimed(sessions, job_id)
    assert job is not None
    with sessions.begin() as session:
        assert jobs.put_down(session, job, pause=True) == "paused"
        assert jobs.get(session, job_id).wanted == "pause"
        assert jobs.ask(session, job_id, "run").status == "queued"
    job = claimed(sessions, job_id)
    assert job is not None
    with sessions.begin() as session:
        jobs.ask(session, job_id, "cancel")
        assert jobs.put_down(session, job, pause=True) == "cancelled"
        assert jobs.get(session, job_id).finished_at is not None


def test_a_job_that_failed_may_be_run_again(sessions: Sessions) -> None:
    job_id = made(sessions)
    job = claimed(sessions, job_id)
    assert job is not None
    with sessions.begin() as session:
        jobs.release(session, job, "failed", error={"code": "x", "message": "y", "param": None})
    with pytest.raises(NotPossible, match="has failed"), sessions.begin() as session:
        jobs.ask(session, job_id, "cancel")
    with sessions.begin() as session:
        again = jobs.ask(session, job_id, "run")
        assert (again.status, again.error, again.finished_at) == ("queued", None, None)


def test_events_come_in_order_and_once(sessions: Sessions) -> None:
    job_id = made(sessions)
    with sessions.begin() as session:
        for number in range(5):
            jobs.add_event(session, job_id, f"event {number}", data={"step": number})
    with sessions() as session:
        seen = jobs.events_after(session, job_id, 0, 3)
        seen += jobs.events_after(session, job_id, seen[-1].number, 10)
    assert [event.message for event in seen] == ["Created", *(f"event {number}" for number in range(5))]


ACTIONS = st.lists(st.sampled_from(["claim", "expire", "renew", "release", "run", "pause", "cancel"]), max_size=25)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ACTIONS)
def test_whatever_happens_a_job_is_never_lost_nor_worked_on_twice(sessions: Sessions, actions: list[str]) -> None:
    job_id = made(sessions)
    holder: Job | None = None
    ended = False
    for action in actions:
        with sessions.begin() as session:
            try:
                if action == "claim":
                    got = jobs.claim(session, job_id, "worker")
                    assert got is None or not ended
                    holder = got or holder
                elif action == "expire":
                    session.execute(update(Job).where(Job.id == job_id).values(leased_until=now() - 1))
                elif action == "renew" and holder is not None:
                    jobs.renew(session, holder)
                elif action == "release" and holder is not None:
                    wanted = jobs.get(session, job_id).wanted
                    left = jobs.put_down(session, holder)
                    assert left == {"run": "queued", "pause": "paused", "cancel": "cancelled"}[wanted]
                    ended = left == "cancelled"
                    holder = None
                elif action in ("run", "pause", "cancel"):
                    job = jobs.ask(session, job_id, action)  # type: ignore[arg-type]
                    ended = job.status == "cancelled"
            except JobError:
                pass
    with sessions.begin() as session:  # whatever its state, it can be brought to an end
        job = jobs.get(session, job_id)
        assert ended == (job.status == "cancelled")
        if not ended:
            jobs.ask(session, job_id, "run")
            session.execute(update(Job).where(Job.id == job_id).values(leased_until=now() - 1))
            assert [each.id for each in jobs.claimable(session, "training") if each.id == job_id] == [job_id]
