"""Does one job under its lease: fetches its files, runs its process, tells how it goes, and keeps its checkpoints.

The process trains and knows nothing of services. Here is what stands between it and the state of record: a thread
that renews the lease, another that carries checkpoints to the object store, and a loop that reads the process's log.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from basalt import tracing
from basalt.api_errors import APIError
from basalt.object_store import ObjectStore, StoreUnavailable
from basalt.record import jobs
from basalt.record.database import Sessions
from basalt.record.files import File, get_file
from basalt.record.jobs import Checkpoint, Job, LeaseLost
from basalt.registry import publish
from basalt.supervisor import end_with_parent
from basalt.train.job import DONE, NO_ROOM, REFUSED, STOPPED
from basalt.train.plan import PLAN, PUBLISHED, REFUSAL, Plan, Refusal
from basalt.work.lease import Lease, Outcome, work_on
from services.trainer import results
from services.trainer.resolve import find_in, plan
from services.trainer.schema import JobRequest
from services.trainer.settings import Settings
from services.trainer.start import bring_version, is_job

log = logging.getLogger("basalt.trainer")

TICK = 0.5  # seconds
CHECKPOINTS_KEPT = 3  # of a stage, in the object store
LOG = "training.log"
RESULTS = "fine-tune-results"  # purpose of the files that a job leaves


class Runner:
    """One worker's.

    Args:
        name: the worker's, told in events.
        stopping: whether the worker is to end; its job then goes back on the queue.
    """

    def __init__(
        self, settings: Settings, sessions: Sessions, store: ObjectStore, name: str, stopping: Callable[[], bool]
    ) -> None:
        self.settings, self.sessions, self.store = settings, sessions, store
        self.name, self.stopping = name, stopping

    def do(self, job_id: str) -> None:
        """Does a job if nobody else does, and leaves the state of record saying what came of it."""
        work_on(self.sessions, job_id, self.name, lambda job, lease: Attempt(self, job, lease).outcome())


class Attempt:
    """One worker's go at one job."""

    def __init__(self, runner: Runner, job: Job, lease: Lease) -> None:
        self.settings, self.sessions, self.store = runner.settings, runner.sessions, runner.store
        self.stopping, self.job, self.lease = runner.stopping, job, lease
        self.directory = runner.settings.work.resolve() / job.id
        with runner.sessions() as session:  # phase → the last step whose figures were told, by others before
            self.told = {data["phase"]: data["step"] for data in jobs.metrics(session, job.id)}
        self.kept: dict[str, int] = {}  # stage → the last step whose checkpoint is in the object store

    def outcome(self) -> Outcome:
        """Does it; returns the job's status now, values to write with it, and the event that tells."""
        if self.lease.wanted != "run":
            return self._at_rest()
        if self.job.attempts > jobs.MAX_ATTEMPTS:
            message = f"given up: it ended {jobs.MAX_ATTEMPTS} times in a row without a new checkpoint"
            return self._failed("attempts_exhausted", message)
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with tracing.span("prepare"):
                prepared = self._with_patience(self._prepare)
        except APIError as error:
            return self._failed(error.code or "invalid_training_job", error.message)
        (self.directory / PLAN).write_text(prepared.model_dump_json())
        (self.directory / REFUSAL).unlink(missing_ok=True)
        self.tell(
            f"Training on {self.job.worker}" + ("" if self.job.attempts == 1 else f", attempt {self.job.attempts}")
        )
        with tracing.span("train"):
            code = self._train(prepared)
        if code == DONE:
            with tracing.span("publish"):
                return self._with_patience(lambda: self._publish(prepared))
        if code == STOPPED or (code < 0 and (self.lease.wanted != "run" or self.stopping())):  # it, or we, ended it
            return self._at_rest()
        if code in (REFUSED, NO_ROOM) and (self.directory / REFUSAL).is_file():
            refusal = Refusal.model_validate_json((self.directory / REFUSAL).read_text())
            if code == NO_ROOM:
                return "paused", {"wanted": "pause"}, f"{refusal.message}. Make room, then resume the job"
            return self._failed(refusal.code, refusal.message)
        return "queued", {}, f"The training process ended with {_told(code)}; it is tried again. {self._last_words()}"

    def _at_rest(self) -> Outcome:
        if self.lease.wanted == "cancel":
            return "cancelled", {}, "Cancelled"
        if self.lease.wanted == "pause":
            return "paused", {}, "Paused; resumed, it goes on from its checkpoint"
        return "queued", {"attempts": 0}, "Its worker was stopped; it goes on from its checkpoint with another"

    def _failed(self, code: str, message: str) -> Outcome:
        files = [] if not (self.directory / LOG).is_file() else self._with_patience(self._result_files)
        error = {"code": code, "message": message, "param": None}
        return "failed", {"error": error, "result": {"files": files}}, f"Failed: {message}"

    # Before

    def _prepare(self) -> Plan:
        """The plan, with the files it needs on this machine, and the last checkpoints where they are not."""
        request = JobRequest.model_validate(self.job.request)
        files = self.settings.work.resolve() / "files"

        def fetched(name: str) -> Path:
            if not name.startswith("file-"):
                return find_in(self.settings.data_root, name)
            with self.sessions() as session:
                file = get_file(session, name)
            path = files / file.digest.removeprefix("sha256:") / file.filename
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                asyncio.run(self.store.get_file(file.key, path))
            return path

        start = parent = None
        if request.start is not None and not is_job(request.start):
            places = self.settings.models_dir, self.settings.versions_dir.resolve()
            version = bring_version(request.start, *places, self.store)
            start, parent = version.directory, version.manifest
        elif request.start is not None:
            with self.sessions() as session:
                parent = jobs.get(session, request.start)
            start = self.settings.work.resolve() / request.start / "stage1"
            self._restore(request.start, "stage1", start)
        prepared = plan(
            request,
            job_id=self.job.id,
            recipes=self.settings.recipes,
            features=self.settings.features,
            find=fetched,
            start=start,
            parent=parent,
        )
        for stage in prepared.stages:
            self._restore(self.job.id, stage.name, self.directory / stage.name)
        return prepared

    def _restore(self, job_id: str, stage: str, directory: Path) -> None:
        with self.sessions() as session:
            checkpoint = jobs.last_checkpoint(session, job_id, stage)
        if checkpoint is None:
            return
        path = directory / "checkpoints" / Path(checkpoint.key).name
        steps = [int(each.name[5:13]) for each in path.parent.glob("step-*.pt")]
        if not steps or max(steps) < checkpoint.step:
            path.parent.mkdir(parents=True, exist_ok=True)
            asyncio.run(self.store.get_file(checkpoint.key, path))
        self.kept[stage] = checkpoint.step

    # Meanwhile

    def _train(self, prepared: Plan) -> int:
        """Runs the training process to its end, or until it is to stop; returns its exit code."""
        self.lease.renew(status="running")
        with (self.directory / LOG).open("ab") as output, ThreadPoolExecutor(1) as carrier:
            process = subprocess.Popen(
                [sys.executable, "-m", "basalt.train.job", str(self.directory)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent,
                env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            carried: Future[None] | None = None
            asked: float | None = None
            try:
                while process.poll() is None:
                    time.sleep(TICK)
                    if self.lease.lost:
                        raise LeaseLost(f"job {self.job.id} is no longer this worker's")
                    self._read_logs(prepared)
                    carried = carrier.submit(self._carry, prepared) if carried is None or carried.done() else carried
                    if self.lease.wanted != "run" or self.stopping():
                        if asked is None:
                            asked = time.monotonic()
                            process.send_signal(signal.SIGTERM)
                        elif time.monotonic() - asked > self.settings.stop_seconds:
                            process.kill()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self._read_logs(prepared)
            if carried is not None:
                carried.result()
            self._with_patience(lambda: self._carry(prepared))
        return process.returncode

    def _read_logs(self, prepared: Plan) -> None:
        """Tells new figures as events, and the last as the job's progress."""
        progress: dict[str, Any] | None = None
        with self.sessions.begin() as session:
            for phase, line in results.lines(self.directory, prepared):
                if line["step"] <= self.told.get(phase, 0):
                    continue
                self.told[phase] = line["step"]
                figures = {name: value for name, value in line.items() if name not in ("seconds", "tokens")}
                data = {"phase": phase, "train_loss": line.get("loss"), **figures}
                jobs.add_event(session, self.job.id, results.told(phase, line), data=data)
                progress = {
                    "phase": phase,
                    **figures,
                    "estimated_finish": results.estimated_finish(phase, line, prepared),
                }
        if progress is not None:
            self.lease.renew(progress=progress)

    def _carry(self, prepared: Plan) -> None:
        """Brings new checkpoints to the object store; while that is down they wait."""
        for stage in prepared.stages:
            for path in sorted((self.directory / stage.name / "checkpoints").glob("step-*.pt")):
                step = int(path.name[5:13])
                if step <= self.kept.get(stage.name, 0):
                    continue
                key = f"jobs/{self.job.id}/{stage.name}/{path.name}"
                try:
                    asyncio.run(self.store.put_file(key, path))
                except FileNotFoundError:  # a newer one took its place
                    continue
                except StoreUnavailable as error:
                    log.warning("job %s: %s; its checkpoint waits", self.job.id, error)
                    return
                self.kept[stage.name] = step
                metrics = results.metrics_at(self.directory / stage.name, step)
                checkpoint = Checkpoint(job_id=self.job.id, stage=stage.name, step=step, key=key, metrics=metrics)
                with self.sessions.begin() as session:
                    jobs.add_checkpoint(session, self.job, checkpoint)

    # After

    def _publish(self, prepared: Plan) -> Outcome:
        model = asyncio.run(publish(self.store, self.directory / PUBLISHED / prepared.name))
        tokens = results.trained_tokens(self.directory, prepared)
        result = {"model": model, "files": self._result_files(), "trained_tokens": tokens}
        return "succeeded", {"result": result}, f"Published {model}"

    def _result_files(self) -> list[str]:
        """The job's log and its figures, as files for download."""
        ids = []
        for name, data in results.files(self.directory, LOG):
            digest = asyncio.run(results.keep(self.store, data))
            file = File(
                id=jobs.new_id("file"), filename=name, purpose="fine-tune-results", bytes=len(data), digest=digest
            )
            with self.sessions.begin() as session:
                session.add(file)
            ids.append(file.id)
        return ids

    def tell(self, message: str, level: str = "info") -> None:
        with self.sessions.begin() as session:
            jobs.add_event(session, self.job.id, message, level=level)

    def _with_patience(self, work: Callable[[], Any]) -> Any:
        """Does what needs the object store, waiting for it where it is gone; the lease is kept meanwhile.

        Raises:
            LeaseLost: the job is not ours any more.
        """
        pause, told = 1.0, False
        while True:
            try:
                return work()
            except StoreUnavailable as error:
                if not told:
                    self.tell(f"{error}; waiting for it", "warn")
                    told = True
                if self.lease.lost:
                    raise LeaseLost(f"job {self.job.id} is no longer this worker's") from error
                time.sleep(pause)
                pause = min(pause * 2, 15.0)

    def _last_words(self) -> str:
        lines = (self.directory / LOG).read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def _told(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL (killed from outside, most often for want of memory: a smaller batch_size needs less)"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
