"""The gateway's HTTP face. `python -m services.gateway`"""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from basalt import api_errors as errors
from basalt import logs, tracing
from basalt.auth import Caller, Guard
from basalt.object_store import IMAGES, ObjectStore, StoreUnavailable
from basalt.record.api_keys import LIMITS
from basalt.record.database import open_database
from basalt.record.files import NoSuchFile
from basalt.record.reader import Reader
from basalt.record.responses import NoSuchResponse
from services.gateway import files, openapi, responses
from services.gateway.assistants import Assistants
from services.gateway.chat import Services, complete
from services.gateway.decoding import Decoders
from services.gateway.fetch import CachedFetcher, Fetcher
from services.gateway.images import ImageIntake
from services.gateway.limits import Buckets, FairQueue, Limits, Room
from services.gateway.llm_client import LLMClient
from services.gateway.settings import Settings
from services.gateway.sources import Sources
from services.gateway.telemetry import Telemetry
from services.gateway.vision_client import VisionClient

log = logging.getLogger("basalt.gateway")

SWEEP_SECONDS = 3600.0  # from one removal of images that are too old to the next
KEY_SECONDS = 2.0  # within which a revoked key is refused


def create_app(settings: Settings) -> FastAPI:
    """The application; its connections live as long as its lifespan.

    Raises:
        ValueError: the settings name no object store.
    """
    store = settings.open_store()
    sessions = open_database(settings.database)
    record = Reader(sessions)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.services = services = open_services(settings, store, record)
        sweeping = asyncio.create_task(_keep_expiring(store, settings.image_days)) if settings.image_days else None
        yield
        if sweeping:
            sweeping.cancel()
        await services.close()
        record.close()
        await asyncio.to_thread(tracing.flush)

    app = FastAPI(title="Basalt", summary="An OpenAI-compatible gateway to your vision assistants", lifespan=lifespan)
    errors.install(app, "gateway")
    for missing in (NoSuchFile, NoSuchResponse):
        app.add_exception_handler(
            missing, lambda _, error: errors.bad_request(str(error), code="not_found", status=404).response()
        )
    app.add_exception_handler(SQLAlchemyError, lambda _, __: errors.unavailable("state of record").response())
    app.add_middleware(Telemetry)

    guard = Guard(
        record,
        "chat",
        host=settings.published or settings.host,
        required=settings.require_key,
        own_key=settings.service_key.get_secret_value(),
        fresh_seconds=KEY_SECONDS,
    )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, caller: Annotated[Caller, Depends(guard)]) -> Response:
        return await complete(request, caller, app.state.services)

    @app.get("/v1/models", dependencies=[Depends(guard)])
    async def models() -> dict[str, Any]:
        assistants: Assistants = app.state.services.assistants
        listed = []
        for name in await assistants.names():
            with suppress(errors.APIError):  # of several versions none is the one that the bare name means
                listed.append(_model(name, await assistants.resolve(name)))
                continue
            listed.append(_model(name))
        return {"object": "list", "data": listed}

    @app.get("/v1/models/{name}", dependencies=[Depends(guard)])
    async def model(name: str) -> dict[str, Any]:
        return _model(name, await app.state.services.assistants.resolve(name))

    app.include_router(files.router(guard, sessions, store))
    app.include_router(responses.router(guard, sessions, store, settings.response_days))

    @app.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """This process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """The services a request needs are there."""
        services: Services = app.state.services
        vision, llm = await asyncio.gather(services.vision.ready(), services.llm.ready())
        missing = [name for name, ready in (("vision", vision), ("llm", llm)) if not ready]
        if missing:
            raise errors.APIError(
                503, f"not ready: no {' and no '.join(missing)}", type="server_error", code="not_ready"
            )
        return {"status": "ready"}

    openapi.install(app)
    return app


def open_services(settings: Settings, store: ObjectStore, record: Reader) -> Services:
    """Must be called inside the event loop."""
    buckets = Buckets(settings.redis_url)
    limits = Limits({name: getattr(settings, name) for name in LIMITS}, buckets)
    fetcher = Fetcher(
        max_bytes=settings.max_image_bytes,
        connect_seconds=settings.fetch_connect_seconds,
        total_seconds=settings.fetch_seconds,
        max_per_host=settings.fetches_per_host,
        private_hosts=settings.allow_private_hosts,
        allowed_hosts=settings.allow_hosts,
    )
    images = ImageIntake(
        CachedFetcher(fetcher, settings.fetch_cache_bytes),
        Decoders(settings.decode_processes, settings.decode_memory_bytes, settings.decode_seconds),
        limits,
        store,
        settings,
    )
    vision = VisionClient(settings.vision_address, settings.embed_seconds)
    return Services(
        settings,
        images,
        Sources(record, images),
        Assistants(record, store, vision),
        vision,
        LLMClient(settings.llm_url, settings.llm_seconds),
        buckets,
        limits,
        FairQueue(settings.max_running, settings.max_waiting, settings.wait_seconds),
        Room(settings.max_held_bytes),
    )


async def _keep_expiring(store: ObjectStore, days: int) -> None:
    while True:
        try:
            await store.expire(IMAGES, days)
        except StoreUnavailable as error:
            log.warning("images older than %d days could not be removed: %s", days, error)
        await asyncio.sleep(SWEEP_SECONDS)


def main() -> None:
    """Exit code 2: could not start."""
    try:
        settings = Settings()
        logs.log_to_stderr(settings.log_level)
        tracing.begin("gateway")
        settings.check_store()
        app = create_app(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        sys.exit(_refuse(f"setting {'.'.join(map(str, problem['loc']))}: {problem['msg']}"))
    except ValueError as error:
        sys.exit(_refuse(str(error)))
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=settings.drain_seconds,
    )


def _model(name: str, resolved: str | None = None) -> dict[str, Any]:
    """OpenAI's model object, with the version, sha256:…, that the name means now, canaries apart. `created` is
    required by OpenAI's clients and not known of an assistant."""
    told = {"id": name, "object": "model", "created": 0, "owned_by": "basalt"}
    return told | ({"version": f"sha256:{resolved.partition('@')[2]}"} if resolved else {})


def _refuse(line: str) -> int:
    print(f"basalt gateway: {line}", file=sys.stderr, flush=True)
    return 2
