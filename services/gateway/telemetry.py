"""What the gateway tells of its work: Prometheus metrics, an id on every request, one log line each.

No image, no prompt and no answer is told; of URLs only the host.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from basalt import logs, tracing
from basalt.api_requests import server_span, tell

log = logging.getLogger("basalt.gateway")

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)

REQUESTS = Counter("basalt_gateway_requests", "Requests answered.", ["route", "assistant", "status"])
SECONDS_TAKEN = Histogram(
    "basalt_gateway_request_seconds", "From request to the end of the answer.", ["route"], buckets=SECONDS
)
FIRST_TOKEN = Histogram(
    "basalt_gateway_first_token_seconds",
    "From request to the first byte of the LLM's answer.",
    ["assistant"],
    buckets=SECONDS,
)
STAGE = Histogram("basalt_gateway_stage_seconds", "Time by stage of the way to the answer.", ["stage"], buckets=SECONDS)
TOKENS = Counter(
    "basalt_gateway_tokens", "Tokens, by kind: prompt, cached (of the prompt), completion.", ["assistant", "kind"]
)
IMAGES = Counter("basalt_gateway_images", "Images taken, by where they came from.", ["source"])
FETCHES = Counter(
    "basalt_gateway_fetches",
    "Image URLs asked for: fetched, cached, shared with another request or refused.",
    ["result"],
)
REFUSED = Counter("basalt_gateway_refused", "Requests turned away, by which limit.", ["limit"])
RUNNING = Gauge("basalt_gateway_running_requests", "Requests being answered by the LLM service.")
WAITING = Gauge("basalt_gateway_waiting_requests", "Requests waiting for their turn.")


@dataclass
class Record:
    """One request, as the log and the metrics tell of it."""

    id: str
    method: str
    path: str
    route: str = "other"
    caller: str = ""  # the id of the API key
    assistant: str = ""
    status: int = 0
    images: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    began: float = field(default_factory=time.perf_counter)
    held: AsyncExitStack = field(default_factory=AsyncExitStack)  # what is given back when the answer is over

    def used(self, usage: dict[str, Any]) -> None:
        """Takes over an answer's `usage`."""
        details = usage.get("prompt_tokens_details") or {}
        self.prompt_tokens += usage.get("prompt_tokens") or 0
        self.cached_tokens += details.get("cached_tokens") or 0
        self.completion_tokens += usage.get("completion_tokens") or 0

    def first_token(self) -> None:
        FIRST_TOKEN.labels(self.assistant).observe(time.perf_counter() - self.began)

    def close(self, span: tracing.Span) -> None:
        """Tells of it, within its span."""
        seconds = time.perf_counter() - self.began
        REQUESTS.labels(self.route, self.assistant, self.status).inc()
        SECONDS_TAKEN.labels(self.route).observe(seconds)
        kinds = {"prompt": self.prompt_tokens, "cached": self.cached_tokens, "completion": self.completion_tokens}
        for kind, count in kinds.items():
            if count:
                TOKENS.labels(self.assistant, kind).inc(count)
        if tracing.on():
            counted = {f"{kind}_tokens": count for kind, count in kinds.items() if count}
            span.told(caller=self.caller, assistant=self.assistant, images=self.images, **counted)
        if self.path not in logs.QUIET and log.isEnabledFor(logging.INFO):
            told = {
                "method": self.method,
                "path": self.path,
                "status": self.status,
                "seconds": round(seconds, 4),
                "caller": self.caller,
                "assistant": self.assistant,
                "images": self.images,
                **kinds,
                "stages": {name: round(value, 4) for name, value in self.stages.items()},
            }
            log.info("request", extra={"told": {name: value for name, value in told.items() if value}})


_current: ContextVar[Record] = ContextVar("record")


def record() -> Record:
    """Of the request that is being answered; outside of one, a record that nobody reads."""
    return _current.get(None) or Record("", "", "")


@contextmanager
def stage(name: str, kind: tracing.Kind = "internal") -> Iterator[None]:
    """Times a part of the way, and makes a span of it."""
    began = time.perf_counter()
    try:
        with tracing.span(name, kind):
            yield
    finally:
        seconds = time.perf_counter() - began
        STAGE.labels(name).observe(seconds)
        stages = record().stages
        stages[name] = max(stages.get(name, 0.0), seconds)  # of several images, which go side by side, the slowest


class Telemetry:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Record(logs.id_of(scope["headers"]), scope["method"], scope["path"])
        header = (logs.REQUEST_ID_HEADER.lower().encode(), request.id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
                message["headers"] = [*message["headers"], header]
            await send(message)

        token = _current.set(request)
        logs.request_id.set(request.id)
        with tracing.OFF if request.path in logs.QUIET else server_span(scope, request.id) as span:
            try:
                async with request.held:
                    await self._app(scope, receive, send_with_id)
            except Exception:
                request.status = request.status or 500
                raise
            finally:
                request.route = getattr(scope.get("route"), "path", "other")
                request.close(span)
                tell(span, scope, request.status)
                _current.reset(token)
