"""The vision service, over gRPC. The channel reconnects by itself when the service comes back."""

import base64
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from basalt import logs, tracing
from basalt.api_errors import APIError, bad_request, failed, timed_out, unavailable
from basalt.handoff import DTYPES, Blob
from basalt.rpc.vision.v1 import vision_pb2, vision_pb2_grpc
from services.gateway.images import StoredImage

log = logging.getLogger("basalt.gateway")

SERVICE = vision_pb2.DESCRIPTOR.services_by_name["Vision"].full_name
MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # of one image's visual tokens: 729 × 4096 float32 are 12 MB
LIST_SECONDS = 5.0  # for calls that compute nothing
MAX_REMEMBERED = 100_000  # images by assistant whose embeddings were left in the hand-off directory
# … after which the service is asked again, so that it knows what is used and lets it lie.
REMEMBERED_SECONDS = 30.0
AWAY_SECONDS = 5.0  # that a service which was away is not asked for what is remembered
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


@dataclass(frozen=True)
class VisualTokens:
    """What the vision service made of one image, or where it lies: under `digest` in the hand-off directory.

    Attributes:
        blob: None where the LLM service is to take it from that directory.
        remembered: the service was not asked; it may have gone meanwhile.
        cached: "embeddings", "features" or "nothing": the furthest of what was there already.
    """

    image_id: str
    digest: str
    cached: str
    blob: Blob | None
    remembered: bool = False

    def part(self) -> dict[str, Any]:
        """The content part that stands in the request where the image stood."""
        if self.blob is None:
            return {"type": "image_embeds", "image_embeds": self.digest, "uuid": self.digest}
        encoded = base64.b64encode(self.blob.header() + self.blob.data).decode()
        return {"type": "image_embeds", "image_embeds": encoded, "uuid": self.digest}


class VisionClient:
    """Make and use inside one event loop; `close` at the end."""

    def __init__(self, address: str, embed_seconds: float) -> None:
        self._embed_seconds = embed_seconds
        self._channel = grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
        self._stub = vision_pb2_grpc.VisionStub(self._channel)
        self._check_health = health_pb2_grpc.HealthStub(self._channel).Check  # pyright: ignore[reportAttributeAccessIssue]
        self._known: dict[str, vision_pb2.AssistantInfo] = {}
        # Model and image → the digest under which their embeddings lie, and when that was last told.
        self._left: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()
        self._away_until = 0.0

    async def close(self) -> None:
        await self._channel.close()

    async def ready(self) -> bool:
        try:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            answer = await self._check_health(request, timeout=LIST_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def assistants(self) -> list[vision_pb2.AssistantInfo]:
        """The assistants being served.

        Raises:
            APIError: 503.
        """
        try:
            answer = await self._stub.ListAssistants(vision_pb2.ListAssistantsRequest(), timeout=LIST_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise _told(error, LIST_SECONDS) from None
        self._known = {assistant.name: assistant for assistant in answer.assistants}
        return list(answer.assistants)

    async def version(self, name: str) -> str | None:
        """The version, sha256:…, that the service has of an assistant in its own directory.

        It is asked only about a name it has not told before, so text-only chat lives on without it.

        Raises:
            APIError: 503.
        """
        if name not in self._known:
            await self.assistants()
        return self._known[name].version if name in self._known else None

    async def embed(self, model: str, image: StoredImage, param: str, *, by_reference: bool) -> VisualTokens:
        """The visual tokens of an image for an assistant. What the service has left in the hand-off directory a moment
        ago, or before it went away, is referred to without asking it: it may still be there.

        Args:
            by_reference: leave them in the hand-off directory where they lie there.

        Raises:
            APIError: 400 not decodable, 404 no such assistant, 502, 503.
        """
        digest, told_at = self._left.get((model, image.id)) or (None, 0.0) if by_reference else (None, 0.0)
        now = time.monotonic()
        if digest and (now < told_at + REMEMBERED_SECONDS or now < self._away_until):
            return VisualTokens(image.id, digest, "embeddings", None, remembered=True)
        try:
            answer = await self._ask(model, image, by_reference)
        except grpc.aio.AioRpcError as error:
            if error.code() in AWAY:
                self._away_until = time.monotonic() + AWAY_SECONDS
                if digest:
                    return VisualTokens(image.id, digest, "embeddings", None, remembered=True)
            if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                raise bad_request(error.details() or "the image cannot be used", param, "invalid_image") from None
            if error.code() == grpc.StatusCode.NOT_FOUND:
                raise bad_request(
                    error.details() or "there is no such model", "model", "model_not_found", 404
                ) from None
            raise _told(error, self._embed_seconds) from None
        if answer.dtype not in DTYPES or len(answer.shape) != 2:
            log.error("vision answered with dtype %r and shape %s", answer.dtype, answer.shape)
            raise failed("vision")
        cached = vision_pb2.Cached.Name(answer.cached).removeprefix("CACHED_").lower()
        if not answer.data:
            self._remember(model, image.id, answer.digest)
            return VisualTokens(image.id, answer.digest, cached, None)
        blob = Blob(answer.data, (answer.shape[0], answer.shape[1]), answer.dtype)
        return VisualTokens(image.id, answer.digest, cached, blob)

    async def _ask(self, model: str, image: StoredImage, by_reference: bool) -> vision_pb2.EmbedResponse:
        by_key = vision_pb2.EmbedRequest(assistant=model, object_key=image.key, by_reference=by_reference)
        by_bytes = vision_pb2.EmbedRequest(assistant=model, image_bytes=image.data, by_reference=by_reference)
        metadata = (("x-request-id", logs.request_id.get()), *tracing.headers().items())
        try:
            return await self._stub.Embed(by_key, timeout=self._embed_seconds, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            # The service may have another object store than ours; the bytes serve as well.
            return await self._stub.Embed(by_bytes, timeout=self._embed_seconds, metadata=metadata)

    def forget(self, model: str, tokens: Sequence[VisualTokens]) -> bool:
        """What was remembered of these is not there any more; whether anything was."""
        gone = [(model, each.image_id) for each in tokens if each.remembered]
        for key in gone:
            self._left.pop(key, None)
        return bool(gone)

    def _remember(self, model: str, image_id: str, digest: str) -> None:
        self._left[model, image_id] = digest, time.monotonic()
        self._left.move_to_end((model, image_id))
        if len(self._left) > MAX_REMEMBERED:
            self._left.popitem(last=False)


def _told(error: grpc.aio.AioRpcError, seconds: float) -> APIError:
    """What a client is told; what happened goes to the log."""
    log.warning("vision: %s: %s", error.code().name, error.details())
    match error.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return unavailable("vision")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return unavailable("vision", "has too much to do")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return timed_out("vision", seconds)
        case _:
            return failed("vision")
