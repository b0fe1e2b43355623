"""The trainer's HTTP face: OpenAI's files and fine-tuning jobs. `python -m services.trainer`"""

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
from basalt.record.files import NoSuchFile
from basalt.record.jobs import NoSuchJob, NotPossible
from basalt.record.reader import Reader
from basalt.work import metrics
from basalt.work.dispatch import Dispatcher
from basalt.work.queue import Queue
from services.trainer import files, fine_tuning
from services.trainer.settings import KIND, Settings


def create_app(settings: Settings) -> FastAPI:
    """The application.

    Raises:
        ValueError: the settings name no database or no object store.
    """
    sessions, store = open_database(settings.database), settings.open_store()
    dispatcher = Dispatcher(Queue(KIND, settings.redis_url), sessions, settings.reconcile_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with dispatcher.reconciling():
            yield
        await asyncio.to_thread(tracing.flush)

    app = FastAPI(title="Basalt trainer", summary="OpenAI's files and fine-tuning jobs", lifespan=lifespan)
    api_errors.install(app, "trainer")
    app.add_middleware(Requests, service="trainer")
    told = ((NoSuchFile, 404, "not_found"), (NoSuchJob, 404, "not_found"), (NotPossible, 409, "conflict"))
    for kind, status, code in told:
        app.add_exception_handler(kind, _told(status, code))
    guard = Guard(Reader(sessions), "train", host=settings.host, required=settings.require_key or None)
    for router in (files.router(settings, sessions, store), fine_tuning.router(settings, sessions, store, dispatcher)):
        app.include_router(router, dependencies=[Depends(guard)])

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
        tracing.begin("trainer")
        settings = Settings()
        settings.check_store()
        app = create_app(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        sys.exit(_refuse(f"setting {'.'.join(map(str, problem['loc']))}: {problem['msg']}"))
    except ValueError as error:
        sys.exit(_refuse(str(error)))
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning", access_log=False)


def _refuse(line: str) -> int:
    print(f"basalt trainer: {line}", file=sys.stderr, flush=True)
    return 2
