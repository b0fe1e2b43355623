"""The evaluator's HTTP face: OpenAI's evals and their runs. `python -m services.evaluator`"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from pydantic import ValidationError

from basalt import api_errors, logs, tracing
from basalt.api_errors import bad_request
from basalt.api_requests import Requests
from basalt.auth import Guard
from basalt.record.database import open_database
from basalt.record.evals import KIND, NoSuchEval
from basalt.record.files import NoSuchFile
from basalt.record.jobs import NotPossible
from basalt.record.reader import Reader
from basalt.work import metrics
from basalt.work.dispatch import Dispatcher
from basalt.work.queue import Queue
from services.evaluator import evals
from services.evaluator.data import Data
from services.evaluator.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The application.

    Raises:
        ValueError: the settings name no database or no object store.
    """
    sessions, store = open_database(settings.database), settings.open_store()
    dispatcher = Dispatcher(Queue(KIND, settings.redis_url), sessions, settings.reconcile_seconds)
    data = Data(settings.data_root, sessions, store, settings.work / "data")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with dispatcher.reconciling():
            yield
        await asyncio.to_thread(tracing.flush)

    app = FastAPI(title="Basalt evaluator", summary="OpenAI's evals and their runs", lifespan=lifespan)
    api_errors.install(app, "evaluator")
    app.add_middleware(Requests, service="evaluator")
    told = ((NoSuchEval, 404, "not_found"), (NoSuchFile, 404, "not_found"), (NotPossible, 409, "conflict"))
    for kind, status, code in told:
        app.add_exception_handler(kind, _told(status, code))
    guard = Guard(Reader(sessions), "evaluate", host=settings.host, required=settings.require_key or None)
    app.include_router(evals.router(settings, sessions, store, data, dispatcher), dependencies=[Depends(guard)])

    app.include_router(metrics.router(sessions, KIND))

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """This process is alive."""
        return {"status": "ok"}

    return app


def _told(status: int, code: str) -> Callable[[Request, Exception], Response]:
    """A handler that tells an error's own message."""
    return lambda _, error: bad_request(str(error), code=code, status=status).response()


def main() -> None:
    """Exit code 2: could not start."""
    logs.log_to_stderr()
    try:
        tracing.begin("evaluator")
        settings = Settings()
        app = create_app(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        sys.exit(_refuse(f"setting {'.'.join(map(str, problem['loc']))}: {problem['msg']}"))
    except ValueError as error:
        sys.exit(_refuse(str(error)))
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning", access_log=False)


def _refuse(line: str) -> int:
    print(f"basalt evaluator: {line}", file=sys.stderr, flush=True)
    return 2
