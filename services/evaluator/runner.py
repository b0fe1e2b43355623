"""Does one run under its lease: brings its data, asks and scores, tells how it goes, and keeps its files.

Every answer is in the state of record as soon as it is there, so another worker goes on where this one was.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import OperationalError

from basalt import tracing
from basalt.data.readers import DataError
from basalt.eval import run as running
from basalt.eval.asking import Limits, Price, Progress
from basalt.eval.endpoint import AskError
from basalt.eval.judge import Judge
from basalt.eval.report import write_run_report
from basalt.eval.run import Result, Task
from basalt.object_store import ObjectStore, StoreUnavailable
from basalt.record import jobs
from basalt.record.database import Sessions
from basalt.record.evals import get_eval
from basalt.record.files import NoSuchFile
from basalt.record.jobs import Job, LeaseLost
from basalt.work.lease import AT_REST, Lease, Outcome
from services.evaluator.data import Data
from services.evaluator.schema import EvalRequest, RunRequest
from services.evaluator.settings import Settings

log = logging.getLogger("basalt.evaluator")

TICK = 0.2  # seconds
TELL = 1.0  # seconds between two looks at the progress
EVENTS = 10  # of progress, in a run
FILES = (
    running.SCORES,
    running.MANIFEST,
    running.RUN,
    running.ANSWERS,
    running.FAILURES,
    running.VERDICTS,
    running.GRADES,
)


class Attempt:
    """One worker's go at one run.

    Args:
        stopping: whether the worker is to end; its run then goes back on the queue.
    """

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        store: ObjectStore,
        job: Job,
        lease: Lease,
        stopping: Callable[[], bool],
    ) -> None:
        self.settings, self.sessions, self.store = settings, sessions, store
        self.job, self.lease, self.stopping = job, lease, stopping
        self.request = RunRequest.model_validate({k: v for k, v in job.request.items() if k != "eval"})
        self.directory = settings.work.resolve() / job.id
        self.progress: dict[str, dict[str, Any]] = {}
        self.told = 0.0
        self.tenths: Counter[str] = Counter()

    def outcome(self) -> Outcome:
        """Does it; returns the job's status now, values to write with it, and the event that tells.

        Raises:
            LeaseLost: the run is not ours any more.
        """
        if self.lease.wanted != "run":
            return AT_REST
        if self.job.attempts > jobs.MAX_ATTEMPTS:
            message = f"given up: it ended {jobs.MAX_ATTEMPTS} times in a row without a new answer"
            return self._failed("attempts_exhausted", message)
        try:
            with tracing.span("evaluate"):
                result = asyncio.run(self._evaluate())
            if self.lease.lost:
                raise LeaseLost(f"run {self.job.id} is no longer this worker's")
            if result.stopped and self._interrupted():
                return AT_REST
            if result.stopped:
                return self._again(result.stopped)
            with tracing.span("publish"):
                return asyncio.run(self._publish(result))
        except (DataError, NoSuchFile) as error:
            return self._failed("invalid_data", str(error))
        except (AskError, StoreUnavailable) as error:
            return self._again(str(error))

    def _interrupted(self) -> bool:
        return self.lease.lost or self.lease.wanted != "run" or self.stopping()

    def _again(self, why: str) -> Outcome:
        """Waits, and gives the run back to be tried again, or up."""
        with self.sessions() as session:
            attempts = jobs.get(session, self.job.id).attempts  # none where it got on
        if attempts >= jobs.MAX_ATTEMPTS:
            return self._failed("not_answered", why)
        until = time.monotonic() + self.settings.retry_seconds * 2 ** max(0, attempts - 1)
        while time.monotonic() < until and not self._interrupted():
            time.sleep(TICK)
        return "queued", {}, f"{why}; it is tried again"

    async def _evaluate(self) -> Result:
        with self.sessions() as session:
            chosen = EvalRequest.model_validate(get_eval(session, self.job.request["eval"]).request)
        data = Data(self.settings.data_root, self.sessions, self.store, self.settings.work / "data")
        source, asked = chosen.data_source_config, self.request.data_source
        task = Task(
            source.benchmark,
            await data.bring(source.data),
            await data.bring(source.images) if source.images else None,
            asked.blind,
            asked.limit,
            asked.sampling_params.model_extra or {},
        )
        judge, calibration = None, None
        for spec in chosen.testing_criteria:
            judge = Judge(self._endpoint(spec.endpoint, spec.model), spec.runs)
            calibration = await data.bring(spec.calibration) if spec.calibration else None
        self.lease.renew(status="running")
        self._tell(f"Asking {asked.model} on {self.job.worker}")
        return await running.evaluate(
            task,
            self._endpoint(asked.endpoint, asked.model),
            self.directory,
            self.sessions,
            judge=judge,
            calibration=calibration,
            limits=Limits(concurrency=self.settings.concurrency),
            price=Price(asked.price.prompt, asked.price.completion) if asked.price else None,
            stop=self._interrupted,
            tell=self._on_progress,
        )

    def _endpoint(self, name: str, model: str) -> Any:
        try:
            return self.settings.endpoint(name, model)
        except KeyError:
            raise DataError(f"the endpoint {name!r} is no longer in the evaluator's settings") from None

    def _on_progress(self, phase: str, now: Progress) -> None:
        self.progress[phase] = now.as_json() | {"done": now.done}
        if time.monotonic() - self.told < TELL and now.done < now.total:
            return
        self.told = time.monotonic()
        answered = {"attempts": 0} if now.asked else {}  # it gets on: its deaths so far do not count
        try:
            self.lease.renew(progress=self.progress, **answered)
            tenth = EVENTS * now.done // now.total
            if tenth > self.tenths[phase]:
                self.tenths[phase] = tenth
                self._tell(f"{phase}: {now.done} of {now.total}", data={"phase": phase, **self.progress[phase]})
        except LeaseLost:
            self.lease.lost = True  # the asking sees it and stops
        except OperationalError as error:
            log.warning("run %s: the state of record cannot be reached: %s", self.job.id, error)

    async def _publish(self, result: Result) -> Outcome:
        """Brings the files to the object store."""
        reported = await asyncio.to_thread(write_run_report, self.directory)
        names = [name for name in FILES if (self.directory / name).exists()] + reported
        for name in names:
            await self.store.put_file(f"evals/{self.job.id}/{name}", self.directory / name)
        told = ("status", "why", "answered", "failures", "scores", "hash")
        scores = {name: result.scores[name] for name in told if name in result.scores}
        values = {"result": {"files": names, "scores": scores, "counts": _counts(result)}, "progress": self.progress}
        return "succeeded", values, f"Done: {scores['status']} {scores['why']}".strip()

    def _failed(self, code: str, message: str) -> Outcome:
        return "failed", {"error": {"code": code, "message": message}}, message

    def _tell(self, message: str, data: dict[str, Any] | None = None) -> None:
        with self.sessions.begin() as session:
            jobs.add_event(session, self.job.id, message, data=data)


def _counts(result: Result) -> dict[str, int]:
    """OpenAI's: `passed` are those that the strictest way of scoring gives at least half a point."""
    verdicts = running.read_verdicts(result.directory)
    passed = sum(list(verdict.values())[-1]["score"] >= 0.5 for verdict in verdicts.values())
    errored = result.progress.total - result.scores["answered"]
    failed = max(0, len(verdicts) - passed - errored) if verdicts else 0
    return {"total": result.progress.total, "errored": errored, "failed": failed, "passed": passed}
