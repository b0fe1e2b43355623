"""What a worker does with a job when something is short, gone or changed; without a training process."""

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from basalt.object_store import DirectoryStore
from basalt.record import jobs
from basalt.record.clock import now
from basalt.record.database import Sessions, open_database
from basalt.record.files import File
from basalt.record.jobs import Job
from basalt.train.plan import Plan, Refusal
from basalt.work.lease import AT_REST, Lease
from services.trainer.disk import tidy
from services.trainer.resolve import recipes_of
from services.trainer.runner import Attempt, Runner, ToRest
from services.trainer.schema import RECIPES, JobRequest
from services.trainer.settings import Settings
from tests.tiny_lm import make_lm
from tests.trainer.conftest import make_recipes

DIGEST = "0" * 64
PHASES = ("stage1", "grounding")


class Worker:
    """A worker's own: its settings, record, store, and a job it has taken."""

    def __init__(self, root: Path) -> None:
        make_recipes(root / "recipes" / "tiny", make_lm(root / "tiny-lm"))
        self.settings = Settings(recipes=root / "recipes", work=root / "jobs", features=root / "features")
        self.sessions: Sessions = open_database(f"sqlite:///{root}/basalt.db")
        self.store = DirectoryStore(root / "objects")
        asyncio.run(self.store.put(f"files/sha256/{DIGEST}", b"[]"))
        with self.sessions.begin() as session:
            session.add(
                File(id="file-1", filename="rows.json", purpose="fine-tune", bytes=2, digest=f"sha256:{DIGEST}")
            )
        self.request = JobRequest(model="tiny", training_file="file-1")
        self.stopping = False

    def take(self) -> Attempt:
        accepted = {RECIPES: recipes_of(self.request, self.settings.recipes)}
        with self.sessions.begin() as session:
            job_id = jobs.create(session, "training", self.request.model_dump(mode="json") | accepted).id
        return self.again(job_id)

    def again(self, job_id: str) -> Attempt:
        with self.sessions.begin() as session:
            job = jobs.claim(session, job_id, "one")
        assert job is not None
        runner = Runner(self.settings, self.sessions, self.store, "one", lambda: self.stopping)
        return Attempt(runner, job, Lease(self.sessions, job))

    def job(self, job_id: str) -> Job:
        with self.sessions() as session:
            return jobs.get(session, job_id)

    def prepared(self, attempt: Attempt) -> Plan:
        attempt.directory.mkdir(parents=True, exist_ok=True)
        return attempt._prepare()


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def test_a_job_is_done_by_the_recipes_it_was_accepted_with(worker: Worker) -> None:
    attempt = worker.take()
    path = worker.settings.recipes / "tiny" / "stage2.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"projector_learning_rate": 0.5}))
    assert worker.prepared(attempt).stages[1].recipe.projector_learning_rate == 3e-3


def test_a_file_deleted_since_is_still_there_for_the_job_that_named_it(worker: Worker) -> None:
    attempt = worker.take()
    with worker.sessions.begin() as session:
        session.get_one(File, "file-1").deleted_at = now()  # type: ignore[assignment]
    rows = worker.prepared(attempt).stages[0].recipe.data[0].rows
    assert rows.read_bytes() == b"[]"


def test_out_of_memory_goes_on_with_passes_in_more_parts(worker: Worker) -> None:
    attempt = worker.take()
    refusal = Refusal(code="out_of_memory", message="CUDA out of memory", stage="stage2")
    status, values, told = attempt._with_less_memory(worker.prepared(attempt), refusal)
    assert status == "queued" and "passes of 2 rows in 2 parts each" in told
    with worker.sessions.begin() as session:
        jobs.put_down(session, attempt.job, **values)
    again = worker.again(attempt.job.id)
    prepared = worker.prepared(again)
    assert [stage.recipe.split for stage in prepared.stages] == [1, 2]
    status, _, told = again._with_less_memory(prepared, refusal)
    assert status == "failed" and "one row at a time" in told


def test_a_full_disk_pauses_the_job_wherever_it_is_met(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = worker.take()

    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(worker.store, "get_file", full)
    status, _, told = attempt.outcome()
    assert status == "paused"
    assert "No space left on device. Make room on one, then resume the job" in told


def test_a_job_that_waits_for_the_store_hears_that_it_is_to_rest(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = worker.take()
    worker.store.root.rename(worker.store.root.with_name("away"))
    worker.store.root.write_bytes(b"")

    def heard(_: float) -> None:
        worker.stopping = True

    monkeypatch.setattr("services.trainer.runner.time.sleep", heard)
    with pytest.raises(ToRest):
        attempt._with_patience(lambda: asyncio.run(worker.store.put("x", b"")))
    assert attempt.outcome() == AT_REST


def test_of_checkpoints_in_the_store_the_last_and_the_best_stay(worker: Worker) -> None:
    attempt = worker.take()
    prepared = worker.prepared(attempt)
    for stage, losses in (("stage1", [3.0, 1.0, 2.0, 2.5, 2.2, 2.1]), ("stage1/grounding", [None] * 5)):
        folder = attempt.directory / stage
        (folder / "checkpoints").mkdir(parents=True)
        for step, loss in enumerate(losses, 1):
            line: dict[str, Any] = {"step": step, "steps": 6, "loss": 1.0, "held_out_loss": loss}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            (folder / "checkpoints" / f"step-{step:08d}.{'a' * 64}.pt").write_bytes(bytes([step]))
            attempt._carry(prepared)
    with worker.sessions() as session:
        steps = {name: [each.step for each in jobs.checkpoints(session, attempt.job.id, name)] for name in PHASES}
    assert steps == {"stage1": [2, 4, 5, 6], "grounding": [3, 4, 5]}
    there = asyncio.run(worker.store.keys(f"jobs/{attempt.job.id}"))
    assert len(there) == 7
    with worker.sessions.begin() as session:
        jobs.put_down(session, attempt.job)
    worker.settings.work = worker.settings.work.with_name("another")  # a worker whose disk has none of it
    again = worker.again(attempt.job.id)
    worker.prepared(again)
    brought = {path.parent.parent.name: path.read_bytes() for path in again.directory.rglob("step-*.pt")}
    assert brought == {"stage1": bytes([6]), "grounding": bytes([5])}


def test_what_jobs_that_are_over_held_of_the_disk_is_taken_away(worker: Worker) -> None:
    ended, failed = worker.take(), worker.take()
    for attempt in (ended, failed):
        worker.prepared(attempt)
        (attempt.directory / "stage1" / "checkpoints").mkdir(parents=True)
        (attempt.directory / "stage1" / "log.jsonl").write_text("{}")
    uploaded = worker.settings.work / "files" / DIGEST
    with worker.sessions.begin() as session:
        jobs.release(session, ended.job, "succeeded")
        jobs.release(session, failed.job, "failed")
    tidy(worker.settings.work, worker.sessions)
    assert not (ended.directory / "stage1" / "checkpoints").exists()
    assert (ended.directory / "stage1" / "log.jsonl").exists()
    assert (failed.directory / "stage1" / "checkpoints").exists()  # it may be resumed
    assert uploaded.exists()
    with worker.sessions.begin() as session:
        jobs.ask(session, failed.job.id, "run")
        jobs.ask(session, failed.job.id, "cancel")
    tidy(worker.settings.work, worker.sessions)
    assert not (failed.directory / "stage1" / "checkpoints").exists()
    assert not uploaded.exists()
