"""The gRPC face of the vision service. `python -m services.vision`"""

import asyncio
import logging
import signal
import sys
import time

import grpc
import prometheus_client
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import ValidationError

from basalt import logs, tracing
from basalt.assistants import AssistantError
from basalt.catalog import Catalog, UnknownAssistant
from basalt.data.images import ImageError
from basalt.object_store import InvalidKey, ObjectNotFound, StoreUnavailable
from basalt.rpc.vision.v1 import vision_pb2, vision_pb2_grpc
from services.vision import metrics
from services.vision.embedder import Cached, Embedder, Embedding, QueueFull
from services.vision.settings import Settings

log = logging.getLogger("basalt.vision")

SERVICE = vision_pb2.DESCRIPTOR.services_by_name["Vision"].full_name
NAME_LENGTH = 200  # of an assistant's name in logs and spans, whatever was asked for
MAX_RESPONSE_BYTES = 64 * 1024 * 1024  # of one image's visual tokens: 729 × 4096 float32 are 12 MB

STATUS = {
    ImageError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidKey: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownAssistant: grpc.StatusCode.NOT_FOUND,
    ObjectNotFound: grpc.StatusCode.NOT_FOUND,
    AssistantError: grpc.StatusCode.UNAVAILABLE,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    TimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
}
CACHED = {
    Cached.NOTHING: vision_pb2.CACHED_NOTHING,
    Cached.FEATURES: vision_pb2.CACHED_FEATURES,
    Cached.EMBEDDINGS: vision_pb2.CACHED_EMBEDDINGS,
}


class StartError(Exception):
    """What is missing or does not fit, in one line."""


class VisionServicer(vision_pb2_grpc.VisionServicer):
    """The contract of `proto/basalt/rpc/vision/v1/vision.proto` over an `Embedder`."""

    def __init__(self, embedder: Embedder, max_seconds: float) -> None:
        self._embedder = embedder
        self._max_seconds = max_seconds

    async def Embed(
        self, request: vision_pb2.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> vision_pb2.EmbedResponse:
        sent = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        logs.request_id.set(sent.get(logs.REQUEST_ID_HEADER.lower(), ""))
        remaining = context.time_remaining()
        deadline = asyncio.get_running_loop().time() + (self._max_seconds if remaining is None else remaining)
        began = time.perf_counter()
        with tracing.span("Embed", "server", sent, assistant=request.assistant[:NAME_LENGTH]) as span:
            try:
                # Past its deadline a request is cancelled, and what is cancelled is taken out of the queue.
                async with asyncio.timeout_at(deadline):
                    embedding = await self._embed(request, deadline)
                span.told(cached=embedding.cached.value)
                _tell(request, began, status="OK", image=embedding.image_id, cached=embedding.cached.value)
            except tuple(STATUS) as error:
                status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
                metrics.ERRORS.labels(status.name).inc()
                span.failed(status.name)
                _tell(request, began, status=status.name)
                embedding = status, str(error) or "the deadline passed before the image was embedded"
        if isinstance(embedding, tuple):
            await context.abort(*embedding)
        return vision_pb2.EmbedResponse(
            data=b"" if request.by_reference and embedding.handed_off else bytes(embedding.blob.data),
            shape=embedding.blob.shape,
            dtype=embedding.blob.dtype,
            digest=embedding.digest,
            image_id=embedding.image_id,
            cached=CACHED[embedding.cached],
        )

    async def ListAssistants(
        self, request: vision_pb2.ListAssistantsRequest, context: grpc.aio.ServicerContext
    ) -> vision_pb2.ListAssistantsResponse:
        return vision_pb2.ListAssistantsResponse(
            assistants=[
                vision_pb2.AssistantInfo(
                    name=name,
                    version=assistant.version,
                    tokens=assistant.manifest.tower.tokens,
                    lm_dim=assistant.manifest.base_lm.lm_dim,
                )
                for name, assistant in sorted(self._embedder.catalog.local.items())
            ]
        )

    async def _embed(self, request: vision_pb2.EmbedRequest, deadline: float) -> Embedding:
        match request.WhichOneof("image"):
            case "image_bytes":
                return await self._embedder.embed_bytes(request.assistant, request.image_bytes, deadline)
            case "object_key":
                return await self._embedder.embed_object(request.assistant, request.object_key, deadline)
            case _:
                raise ImageError("the request has no image: set image_bytes or object_key")


def _tell(request: vision_pb2.EmbedRequest, began: float, **told: str) -> None:
    """The log line of a request."""
    seconds = round(time.perf_counter() - began, 4)
    log.info("request", extra={"told": {"assistant": request.assistant[:NAME_LENGTH], "seconds": seconds, **told}})


class VisionServer:
    """The listening server: start, then stop with a drain."""

    def __init__(self, embedder: Embedder, settings: Settings) -> None:
        self._embedder = embedder
        self._settings = settings
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_image_bytes + 64 * 1024),
                ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
                ("grpc.so_reuseport", 0),  # else a second server on the same port would start unnoticed
                # Clients' keepalive pings are welcome; by default they would be answered with GOAWAY.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # So that clients look for new replicas now and then.
                ("grpc.max_connection_age_ms", 30 * 60 * 1000),
                ("grpc.max_connection_age_grace_ms", int(settings.max_seconds * 1000)),
            ]
        )
        vision_pb2_grpc.add_VisionServicer_to_server(VisionServicer(embedder, settings.max_seconds), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> int:
        """Listens and serves; returns the port.

        Raises:
            StartError: the port is taken.
        """
        address = f"{self._settings.host}:{self._settings.port}"
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise StartError(f"cannot listen on {address}: is the port taken? Set BASALT_VISION_PORT") from None
        await self._server.start()
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def stop(self) -> None:
        """NOT_SERVING first, no new requests, then up to `drain_seconds` for the running ones."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._settings.drain_seconds)
        await self._embedder.close()


def load(settings: Settings) -> Embedder:
    """All assistants of the models directory.

    Raises:
        StartError: there is none, or something of them is missing or does not fit.
    """
    try:
        check_device(settings.device)
        settings.check_store()
        store = settings.open_store()
        catalog = Catalog(settings.models_dir, settings.versions_dir, store)
        if not catalog.local:
            raise StartError(
                f"no assistant in {settings.models_dir.resolve()}: set BASALT_MODELS_DIR to a directory of them"
            )
        embedder = Embedder(catalog, store, settings)
        embedder.load()
    except (AssistantError, ValueError, RuntimeError, OSError) as error:
        raise StartError(str(error)) from error
    return embedder


def check_device(name: str) -> None:
    """Raises StartError where torch has no such device."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartError(f"BASALT_VISION_DEVICE={name}: torch sees {torch.cuda.device_count()} GPUs here")


async def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    torch.set_num_threads(settings.torch_threads)
    embedder = await asyncio.to_thread(load, settings)
    server = VisionServer(embedder, settings)
    port = await server.start()
    if settings.metrics_port is not None:
        prometheus_client.start_http_server(settings.metrics_port, settings.host)
    log.info("serving %s at %s:%d", ", ".join(sorted(embedder.catalog.local)), settings.host, port)
    await stopping.wait()
    log.info("stopping: finishing running requests")
    await server.stop()
    await asyncio.to_thread(tracing.flush)


def main() -> None:
    """Exit code 2: could not start."""
    logs.log_to_stderr()
    try:
        tracing.begin("vision")
        asyncio.run(serve(Settings()))
    except ValidationError as error:
        problem = error.errors()[0]
        sys.exit(_refuse(f"setting {'.'.join(map(str, problem['loc']))}: {problem['msg']}"))
    except (StartError, ValueError) as error:
        sys.exit(_refuse(str(error)))


def _refuse(line: str) -> int:
    print(f"basalt vision: {line}", file=sys.stderr, flush=True)
    return 2
