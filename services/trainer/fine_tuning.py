"""`/v1/fine_tuning/jobs`: create, list, retrieve, cancel, pause, resume, events (as a list or live), checkpoints."""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from basalt.api_errors import bad_request
from basalt.api_lists import page
from basalt.object_store import ObjectStore
from basalt.record import jobs
from basalt.record.database import Sessions
from basalt.record.files import get_file
from basalt.record.jobs import ENDED, Checkpoint, Event, Job
from basalt.work.dispatch import Dispatcher
from basalt.work.events import live
from services.trainer.resolve import find_in, plan, recipes_of
from services.trainer.schema import (
    RECIPES,
    JobRequest,
    ResumeRequest,
    StageName,
    checkpoint_object,
    event_object,
    job_object,
    request_of,
)
from services.trainer.settings import KIND, Settings
from services.trainer.start import find_version, is_job

Limit = Annotated[int, Query(ge=1, le=100)]


def router(settings: Settings, sessions: Sessions, store: ObjectStore, dispatcher: Dispatcher) -> APIRouter:
    routes = APIRouter(prefix="/v1/fine_tuning/jobs")

    @routes.post("")
    def create(request: JobRequest) -> dict[str, Any]:
        with sessions.begin() as session:

            def there(name: str) -> Path:
                """Whether a file is there is asked now, its contents later."""
                if name.startswith("file-"):
                    return Path(get_file(session, name).filename)
                return find_in(settings.data_root, name)

            wanted, parent = request.start, None
            if wanted is not None and not is_job(wanted):
                wanted, parent = find_version(wanted, session, store, settings.models_dir)
            elif wanted is not None:
                parent = jobs.get(session, wanted)
                if parent.status not in ENDED and "stage2" not in str(parent.progress.get("phase")):
                    raise jobs.NotPossible(
                        f"job {wanted} is {parent.status} and its stage 1 not at its end: wait for that, or cancel it "
                        "to go on from where it is"
                    )
                if jobs.last_checkpoint(session, wanted, "stage1") is None:
                    raise jobs.NotPossible(
                        f"job {wanted} has no checkpoint of stage 1 to go on from; where it published a version, "
                        "'start' takes that"
                    )
            start = None if wanted is None else Path(wanted)
            accepted = recipes_of(request, settings.recipes)
            plan(
                request,
                job_id="",
                recipes=settings.recipes,
                accepted=accepted,
                features=settings.features,
                find=there,
                start=start,
                parent=parent,
            )
            # The version that is meant now: an alias may point elsewhere when the job's turn comes. So may a recipe be
            # another one.
            meant = request.model_copy(update={"start": wanted}).model_dump(mode="json")
            job = jobs.create(session, KIND, meant | {RECIPES: accepted})
            made = job_object(jobs.get(session, job.id))
        dispatcher.send(job.id)
        return made

    @routes.get("")
    def list_all(request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        wanted = {name[9:-1]: value for name, value in request.query_params.items() if name.startswith("metadata[")}
        with sessions() as session:
            query = select(Job).where(Job.kind == KIND).order_by(Job.created_at.desc(), Job.id.desc())
            if after is not None:
                query = query.where(Job.created_at < jobs.get(session, after).created_at)
            for name, value in wanted.items():
                query = query.where(Job.request["metadata"][name].as_string() == value)
            found = [job_object(job) for job in session.scalars(query.limit(limit + 1))]
        return page(found, limit)

    @routes.get("/{job_id}")
    def retrieve(job_id: str) -> dict[str, Any]:
        with sessions() as session:
            return job_object(jobs.get(session, job_id))

    def asked(job_id: str, wanted: Literal["run", "pause", "cancel"]) -> dict[str, Any]:
        with sessions.begin() as session:
            jobs.ask(session, job_id, wanted)
            return job_object(jobs.get(session, job_id))

    @routes.post("/{job_id}/cancel")
    def cancel(job_id: str) -> dict[str, Any]:
        return asked(job_id, "cancel")

    @routes.post("/{job_id}/pause")
    def pause(job_id: str) -> dict[str, Any]:
        return asked(job_id, "pause")

    @routes.post("/{job_id}/resume")
    def resume(job_id: str, wanted: ResumeRequest | None = None) -> dict[str, Any]:
        """Goes on from where it is. Ours: a stage may be given another number of steps, longer or shorter."""
        with sessions.begin() as session:
            for stage, steps in (wanted or ResumeRequest()).ends().items():
                end_at(session, jobs.get(session, job_id), stage, steps)
            jobs.ask(session, job_id, "run")
            return job_object(jobs.get(session, job_id))

    @routes.get("/{job_id}/events", response_model=None)
    async def events(
        job_id: str, after: str | None = None, limit: Limit = 20, stream: bool = False
    ) -> Response | dict[str, Any]:
        """The newest first, as OpenAI's; with `stream` all of them in order as they come, as server-sent events."""
        if stream:
            await asyncio.to_thread(retrieve, job_id)
            return StreamingResponse(
                live(sessions, job_id, _number(after) or 0, event_object), media_type="text/event-stream"
            )
        return await asyncio.to_thread(_listed, job_id, Event, event_object, after, limit)

    @routes.get("/{job_id}/checkpoints")
    def checkpoints(job_id: str, after: str | None = None, limit: Limit = 10) -> dict[str, Any]:
        return _listed(job_id, Checkpoint, checkpoint_object, after, limit)

    def _listed(job_id: str, table: Any, shown: Any, after: str | None, limit: int) -> dict[str, Any]:
        with sessions() as session:
            jobs.get(session, job_id)
            query = select(table).where(table.job_id == job_id).order_by(table.number.desc())
            if (number := _number(after)) is not None:
                query = query.where(table.number < number)
            return page([shown(item) for item in session.scalars(query.limit(limit + 1))], limit)

    return routes


def end_at(session: Session, job: Job, stage: StageName, steps: int) -> None:
    """Has a stage of a job that rests end at step `steps`.

    Raises:
        APIError: (400) it has no such stage, or is past that step.
        NotPossible: it does not rest.
    """
    request, last = request_of(job), jobs.last_checkpoint(session, job.id, stage)
    stages = [name for name, _ in request.method.stages()]
    if job.status not in ("paused", "failed"):
        raise jobs.NotPossible(f"job {job.id} is {job.status}: its steps can be changed while it is paused")
    if stage not in stages:
        raise bad_request(f"job {job.id} has {' and '.join(stages)}, no {stage}", stage)
    if stage == "stage1" and str(job.progress.get("phase")).startswith("stage2"):
        raise bad_request(f"stage1 of job {job.id} is done, and stage2 builds on it", "stage1")
    if last is not None and steps <= last.step:
        raise bad_request(f"{stage} is at step {last.step}: 'steps' is where it ends, those done counted in", stage)
    job.request = job.request | request.with_steps(stage, steps).model_dump(mode="json")
    jobs.add_event(session, job.id, f"{stage} is to end at step {steps}")


def _number(after: str | None) -> int | None:
    """`ftevent-12` → 12; of anything else nothing comes after."""
    if after is None:
        return None
    tail = after.rpartition("-")[2]
    return int(tail) if tail.isdigit() else 0
