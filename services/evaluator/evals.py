"""`/v1/evals`: evals and their runs; cancel, events (live), and the files of a finished run."""

import asyncio
import mimetypes
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from basalt.api_errors import bad_request, unavailable
from basalt.api_lists import page
from basalt.eval.run import JUDGED
from basalt.eval.scoring import BENCHMARKS
from basalt.object_store import ObjectNotFound, ObjectStore, StoreUnavailable
from basalt.record import jobs
from basalt.record.database import Sessions
from basalt.record.evals import Eval, NoSuchEval, create_eval, create_run, get_eval, get_run, runs_of
from basalt.work.dispatch import Dispatcher
from basalt.work.events import live
from services.evaluator.data import Data
from services.evaluator.schema import (
    EvalRequest,
    RunRequest,
    eval_object,
    event_object,
    run_object,
)
from services.evaluator.settings import Settings

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


def router(settings: Settings, sessions: Sessions, store: ObjectStore, data: Data, dispatcher: Dispatcher) -> APIRouter:
    routes = APIRouter(prefix="/v1/evals")

    @routes.post("", status_code=201)
    def create(request: EvalRequest) -> dict[str, Any]:
        _check(request)
        if request.run is not None:
            _endpoint(request.run.data_source.endpoint, "run.data_source.endpoint")
        with sessions.begin() as session:
            made = create_eval(session, request.model_dump(mode="json", exclude={"run"}))
            run = create_run(session, made.id, request.run.model_dump(mode="json")) if request.run else None
            told = eval_object(made) | ({"run": run_object(run)} if run else {})
        if run is not None:
            dispatcher.send(run.id)
        return told

    @routes.get("")
    def list_all(after: str | None = None, limit: Limit = 20, order: Order = "asc") -> dict[str, Any]:
        with sessions() as session:
            by = (Eval.created_at, Eval.id) if order == "asc" else (Eval.created_at.desc(), Eval.id.desc())
            found = [eval_object(one) for one in session.scalars(select(Eval).order_by(*by))]
        return _page(found, after, limit)

    @routes.get("/{eval_id}")
    def retrieve(eval_id: str) -> dict[str, Any]:
        with sessions() as session:
            return eval_object(get_eval(session, eval_id))

    @routes.post("/{eval_id}/runs", status_code=201)
    def run(eval_id: str, request: RunRequest) -> dict[str, Any]:
        _endpoint(request.data_source.endpoint, "data_source.endpoint")
        with sessions.begin() as session:
            get_eval(session, eval_id)
            job = create_run(session, eval_id, request.model_dump(mode="json"))
            told = run_object(job)
        dispatcher.send(job.id)
        return told

    @routes.get("/{eval_id}/runs")
    def list_runs(
        eval_id: str, after: str | None = None, limit: Limit = 20, order: Order = "asc", status: str | None = None
    ) -> dict[str, Any]:
        with sessions() as session:
            get_eval(session, eval_id)
            found = [run_object(job) for job in runs_of(session, eval_id, newest_first=order == "desc")]
        return _page([one for one in found if status in (None, one["status"])], after, limit)

    @routes.get("/{eval_id}/runs/{run_id}")
    def retrieve_run(eval_id: str, run_id: str) -> dict[str, Any]:
        with sessions() as session:
            return run_object(get_run(session, eval_id, run_id))

    @routes.post("/{eval_id}/runs/{run_id}/cancel")
    def cancel(eval_id: str, run_id: str) -> dict[str, Any]:
        """Stops it for good; the answers there are stay, and another run does not ask for them again."""
        with sessions.begin() as session:
            get_run(session, eval_id, run_id)
            jobs.ask(session, run_id, "cancel")
            return run_object(get_run(session, eval_id, run_id))

    @routes.get("/{eval_id}/runs/{run_id}/events", response_model=None)
    async def events(
        eval_id: str, run_id: str, after: str | None = None, limit: Limit = 100, stream: bool = False
    ) -> Response | dict[str, Any]:
        """In order, from the one after `after`; with `stream` as server-sent events until the run has ended."""
        number = int(last) if after and (last := after.rpartition("-")[2]).isdecimal() else 0

        def listed() -> dict[str, Any]:
            with sessions() as session:
                get_run(session, eval_id, run_id)
                found = jobs.events_after(session, run_id, number, limit + 1)
            return page([event_object(event) for event in found], limit)

        first = await asyncio.to_thread(listed)
        if not stream:
            return first
        return StreamingResponse(live(sessions, run_id, number, event_object), media_type="text/event-stream")

    @routes.get("/{eval_id}/runs/{run_id}/files")
    def files(eval_id: str, run_id: str) -> dict[str, Any]:
        with sessions() as session:
            job = get_run(session, eval_id, run_id)
        names = (job.result or {}).get("files", [])
        return page([{"id": name, "object": "eval.run.file"} for name in names], len(names))

    @routes.get("/{eval_id}/runs/{run_id}/files/{name}")
    async def file(eval_id: str, run_id: str, name: str) -> Response:
        known = [one["id"] for one in (await asyncio.to_thread(files, eval_id, run_id))["data"]]
        if name not in known:
            raise NoSuchEval(f"the run {run_id} has no file {name[:100]!r}; it has {', '.join(known) or 'none yet'}")
        try:
            content = await store.get(f"evals/{run_id}/{name}")
        except (StoreUnavailable, ObjectNotFound):
            raise unavailable("object store") from None
        kind = "application/jsonl" if name.endswith(".jsonl") else mimetypes.guess_type(name)[0]
        return Response(content, media_type=kind or "application/octet-stream")

    def _check(request: EvalRequest) -> None:
        """Whether what it names is there is asked now, its contents later."""
        source = request.data_source_config
        if source.benchmark not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise bad_request(f"there is no benchmark {source.benchmark[:100]!r}; there are {known}", "benchmark")
        if request.testing_criteria and source.benchmark not in JUDGED:
            raise bad_request(
                f"{source.benchmark} is scored by rules; only {', '.join(JUDGED)} has a judge", "testing_criteria"
            )
        for judge in request.testing_criteria:
            _endpoint(judge.endpoint, "testing_criteria.endpoint")
        named = [("data", source.data), ("images", source.images)]
        named += [("calibration", judge.calibration) for judge in request.testing_criteria]
        for param, name in named:
            if name is not None:
                try:
                    data.check(name, param)
                except StoreUnavailable:
                    raise unavailable("object store") from None

    def _endpoint(name: str, param: str) -> None:
        try:
            settings.endpoint(name, "")
        except KeyError:
            known = ", ".join(["gateway", *settings.endpoints])
            raise bad_request(
                f"there is no endpoint {name[:100]!r} in the settings; there are {known}", param
            ) from None

    return routes


def _page(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    if after is not None:
        ids = [item["id"] for item in items]
        items = items[ids.index(after) + 1 :] if after in ids else []
    return page(items[: limit + 1], limit)
