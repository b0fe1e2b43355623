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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from basalt import tracing
from basalt.api_errors import APIError
from basalt.object_store import ObjectStore, StoreUnavailable
from basalt.record import jobs
from basalt.record.database import Sessions
from basalt.record.files import File, accepted_file
from basalt.record.jobs import Checkpoint, Job, LeaseLost
from basalt.registry import publish
from basalt.supervisor import end_with_parent
from basalt.train.job import DONE, NO_MEMORY, NO_ROOM, NO_SPACE, REFUSED, STOPPED
from basalt.train.plan import PLAN, PUBLISHED, REFUSAL, SAID, Plan, Refusal
from basalt.work.lease import AT_REST, UNREACHABLE, Lease, Outcome, work_on
from services.trainer import results
from services.trainer.disk import tidy
from services.trainer.resolve import find_in, plan, recipes_of
from services.trainer.schema import RECIPES, request_of
from services.trainer.settings import Settings
from services.trainer.start import bring_version, is_job, settle_name

log = logging.getLogger("basalt.trainer")

T = TypeVar("T")

TICK = 0.5  # seconds
CHECKPOINTS_KEPT = 3  # of a stage, in the object store; the best by held-out loss is kept besides
LOG = "training.log"
RESULTS = "fine-tune-results"  # purpose of the files that a job leaves


class ToRest(Exception):
    """The job was asked to rest while it waited for something that is gone."""


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
        tidy(self.settings.work.resolve(), self.sessions)
        work_on(self.sessions, job_id, self.name, lambda job, lease: Attempt(self, job, lease).outcome())


class Attempt:
    """One worker's go at one job."""

    def __init__(self, runner: Runner, job: Job, lease: Lease) -> None:
        self.settings, self.sessions, self.store = runner.settings, runner.sessions, runner.store
        self.stopping, self.job, self.lease = runner.stopping, job, lease
        self.directory = runner.settings.work.resolve() / job.id
        with runner.sessions() as session:  # phase → the last step whose figures were told, by others before
            self.told = {data["phase"]: data["step"] for data in jobs.metrics(session, job.id)}
        self.said = 0  # lines that the process said and that were told
        self.kept: dict[str, int] = {}  # stage → the last step whose checkpoint is in the object store

    def outcome(self) -> Outcome:
        """Does it; returns the job's status now, values to write with it, and the event that tells."""
        if self._to_rest():
            return AT_REST
        if self.job.attempts > jobs.MAX_ATTEMPTS:
            message = f"given up: it ended {jobs.MAX_ATTEMPTS} times in a row and got no further"
            return self._failed("attempts_exhausted", message)
        try:
            return self._done()
        except ToRest:
            return AT_REST
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return self._no_room(str(error))

    def _done(self) -> Outcome:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with tracing.span("prepare"):
                prepared = self._with_patience(self._prepare)
        except APIError as error:
            return self._failed(error.code or "invalid_training_job", error.message)
        (self.directory / PLAN).write_text(prepared.model_dump_json())
        for of_before in (REFUSAL, SAID):
            (self.directory / of_before).unlink(missing_ok=True)
        self.tell(
            f"Training on {self.job.worker}" + ("" if self.job.attempts == 1 else f", attempt {self.job.attempts}")
        )
        with tracing.span("train"):
            code = self._train(prepared)
        if code == DONE:
            with tracing.span("publish"):
                return self._with_patience(lambda: self._publish(prepared))
        if code == STOPPED or (code < 0 and self._to_rest()):  # it, or we, ended it
            return AT_REST
        path = self.directory / REFUSAL
        refusal = Refusal.model_validate_json(path.read_text()) if path.is_file() else None
        if code == NO_ROOM:
            return self._no_room(self._last_words() if refusal is None else refusal.message)
        if code == NO_MEMORY and refusal is not None:
            return self._with_less_memory(prepared, refusal)
        if code == REFUSED and refusal is not None:
            return self._failed(refusal.code, refusal.message)
        words = "" if code < 0 else f". {self._last_words()}"  # a killed process had no time for any
        return "queued", {}, f"The training process ended with {_told(code)}; it is tried again{words}"

    def _to_rest(self) -> bool:
        return self.lease.wanted != "run" or self.stopping()

    def _failed(self, code: str, message: str) -> Outcome:
        files = [] if not (self.directory / LOG).is_file() else self._with_patience(self._result_files)
        error = {"code": code, "message": message, "param": None}
        return "failed", {"error": error, "result": {"files": files}}, f"Failed: {message}"

    def _no_room(self, message: str) -> Outcome:
        return "paused", {}, f"{message}. Make room on {self.job.worker}, then resume the job"

    def _with_less_memory(self, prepared: Plan, refusal: Refusal) -> Outcome:
        """Again from the last checkpoint, each pass in twice as many parts, as long as there are rows to part."""
        recipe = next(stage.recipe for stage in prepared.stages if stage.name == refusal.stage)
        parts = 2 * recipe.split
        if parts > recipe.rows_per_pass:
            message = (
                f"out of memory with one row at a time ({refusal.message}): set recompute or quantize, or a shorter"
            )
            return self._failed(refusal.code, f"{message} row_length")
        request = self.job.request
        recipes = request[RECIPES] | {refusal.stage: request[RECIPES][refusal.stage] | {"split": parts}}
        message = (
            f"{refusal.stage} ran out of memory ({refusal.message}). It goes on from its last checkpoint with passes "
            f"of {recipe.rows_per_pass} rows in {parts} parts each: the same batch, learned the same"
        )
        return "queued", {"request": request | {RECIPES: recipes}, "attempts": 0}, message

    # Before

    def _prepare(self) -> Plan:
        """The plan, with the files it needs on this machine, and the last checkpoints where they are not."""
        request = request_of(self.job)
        files = self.settings.work.resolve() / "files"

        def fetched(name: str) -> Path:
            if not name.startswith("file-"):
                return find_in(self.settings.data_root, name)
            with self.sessions() as session:
                file = accepted_file(session, name)
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
            start = self.directory / "start"
            self._restore(request.start, "stage1", start)
        prepared = plan(
            request,
            job_id=self.job.id,
            recipes=self.settings.recipes,
            accepted=self.job.request.get(RECIPES) or recipes_of(request, self.settings.recipes),
            features=self.settings.features,
            find=fetched,
            start=start,
            parent=parent,
        )
        for phase, folder in results.phases(prepared):
            self.kept[phase] = self._restore(self.job.id, phase, self.directory / folder)
        return prepared

    def _restore(self, job_id: str, stage: str, directory: Path) -> int:
        """Brings the last checkpoint in the object store, unless a later one is here; returns its step, 0 for none."""
        with self.sessions() as session:
            checkpoint = jobs.last_checkpoint(session, job_id, stage)
        if checkpoint is None:
            return 0
        path = directory / "checkpoints" / Path(checkpoint.key).name
        steps = [int(each.name[5:13]) for each in path.parent.glob("step-*.pt")]
        if not steps or max(steps) < checkpoint.step:
            path.parent.mkdir(parents=True, exist_ok=True)
            asyncio.run(self.store.get_file(checkpoint.key, path))
        return checkpoint.step

    # Meanwhile

    def _train(self, prepared: Plan) -> int:
        """Runs the training process to its end, or until it is to stop; returns its exit code."""
        self.lease.insist(lambda: self.lease.renew(status="running"))
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
                    if not self.lease.lost:
                        with self._heard("its figures wait"):
                            self._read_logs(prepared)
                        if carried is None or carried.done():
                            carried = carrier.submit(self._try_to_carry, prepared)
                    if self.lease.lost or self._to_rest():
                        if asked is None:
                            asked = time.monotonic()
                            process.send_signal(signal.SIGTERM)
                        elif time.monotonic() - asked > self.settings.stop_seconds:
                            process.kill()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if carried is not None:
                carried.result()
            if self.lease.lost:
                raise LeaseLost(f"job {self.job.id} is no longer this worker's")
            self.lease.insist(lambda: self._read_logs(prepared))
            try:
                self._with_patience(lambda: self._carry(prepared), resting=self.settings.stop_seconds)
            except ToRest:
                self.tell(f"The object store is gone: what it learned last is on {self.job.worker} alone", "warn")
        return process.returncode

    def _read_logs(self, prepared: Plan) -> None:
        """Tells as events what is newly said, and new figures; the last are the job's progress."""
        progress: dict[str, Any] | None = None
        told, said = dict(self.told), results.said(self.directory)
        with self.sessions.begin() as session:
            for line in said[self.said :]:
                jobs.add_event(session, self.job.id, line["message"], level=line["level"])
            for phase, line in results.lines(self.directory, prepared):
                if line["step"] <= told.get(phase, 0):
                    continue
                told[phase] = line["step"]
                figures = {name: value for name, value in line.items() if name not in ("seconds", "tokens")}
                data = {"phase": phase, "train_loss": line.get("loss"), **figures}
                jobs.add_event(session, self.job.id, results.told(phase, line), data=data)
                progress = {"phase": phase, **figures, **results.finishes(phase, line, prepared)}
        self.told, self.said = told, len(said)
        if progress is not None:
            self.lease.renew(progress=progress, attempts=0)  # it gets on: how it ended before does not count

    def _try_to_carry(self, prepared: Plan) -> None:
        with self._heard("its checkpoint waits"):
            self._carry(prepared)

    @contextmanager
    def _heard(self, so: str) -> Iterator[None]:
        """What is gone for a while is asked again later."""
        try:
            yield
        except (StoreUnavailable, *UNREACHABLE) as error:
            log.warning("job %s: %s; %s", self.job.id, error, so)

    def _carry(self, prepared: Plan) -> None:
        """Brings new checkpoints to the object store, and takes old ones away.

        Raises:
            StoreUnavailable: it cannot be asked.
            LeaseLost: the job is not ours any more.
        """
        for phase, folder in results.phases(prepared):
            for path in sorted((self.directory / folder / "checkpoints").glob("step-*.pt")):
                step = int(path.name[5:13])
                if step <= self.kept.get(phase, 0):
                    continue
                key = f"jobs/{self.job.id}/{folder}/{path.name}"
                try:
                    asyncio.run(self.store.put_file(key, path))
                except FileNotFoundError:  # a newer one took its place
                    continue
                metrics = results.metrics_at(self.directory / folder, step)
                checkpoint = Checkpoint(job_id=self.job.id, stage=phase, step=step, key=key, metrics=metrics)
                with self.sessions.begin() as session:
                    jobs.add_checkpoint(session, self.job, checkpoint)
                self.kept[phase] = step
                self._prune(phase)

    def _prune(self, phase: str) -> None:
        with self.sessions() as session:
            kept = jobs.checkpoints(session, self.job.id, phase)
        measured = [each for each in kept if "full_valid_loss" in each.metrics]
        best = min(measured, key=lambda each: each.metrics["full_valid_loss"], default=None)
        for old in kept[:-CHECKPOINTS_KEPT]:
            if old is not best:
                asyncio.run(self.store.delete(old.key))
                with self.sessions.begin() as session:
                    session.delete(old)

    # After

    def _publish(self, prepared: Plan) -> Outcome:
        self._settle(prepared.name)  # before there is another: what was put there by hand has no alias
        model = asyncio.run(publish(self.store, self.directory / PUBLISHED / prepared.name))
        tokens = results.trained_tokens(self.directory, prepared)
        result = {"model": model, "files": self._result_files(), "trained_tokens": tokens}
        return "succeeded", {"result": result}, f"Published {model}; {_meaning(model, self._settle(prepared.name))}"

    def _settle(self, name: str) -> str | None:
        with self.sessions.begin() as session:
            return settle_name(name, session, self.store, self.settings.models_dir)

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
        def write() -> None:
            with self.sessions.begin() as session:
                jobs.add_event(session, self.job.id, message, level=level)

        self.lease.insist(write)

    def _with_patience(self, work: Callable[[], T], *, resting: float = 0.0) -> T:
        """Does what needs the object store, waiting for it where it is gone; the lease is kept meanwhile.

        Args:
            resting: seconds that it is waited for on, once the job was asked to rest; none where it was cancelled.

        Raises:
            ToRest: the job was asked to rest, and it is still gone.
            LeaseLost: the job is not ours any more.
        """
        pause, asked, told = 1.0, 0.0, False
        while True:
            try:
                return self.lease.insist(work)
            except StoreUnavailable as error:
                if not told:
                    self.tell(f"{error}; waiting for it", "warn")
                    told = True
                if self.lease.lost:
                    raise LeaseLost(f"job {self.job.id} is no longer this worker's") from error
                if self._to_rest():
                    asked = asked or time.monotonic()
                    if self.lease.wanted == "cancel" or time.monotonic() - asked >= resting:
                        raise ToRest from error
                time.sleep(pause)
                pause = min(pause * 2, 5.0)

    def _last_words(self) -> str:
        lines = (self.directory / LOG).read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def _meaning(published: str, meant: str | None) -> str:
    name = published.partition("@")[0]
    if published == meant:
        return f"{name!r} means it"
    still = "means none of its versions yet" if meant is None else f"still means {meant}"
    return f"{name!r} {still}: `basalt models promote {published}` changes that"


def _told(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL (killed from outside, most often for want of memory: a smaller batch_size needs less)"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
