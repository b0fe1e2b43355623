"""Around an HTTP API: an id on every request, one log line and one span each."""

import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from basalt import logs, tracing

_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Requests:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp, service: str) -> None:
        self._app, self._log = app, logging.getLogger(f"basalt.{service}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in logs.QUIET:
            await self._app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()
        request_id = logs.id_of(scope["headers"])
        header = (logs.REQUEST_ID_HEADER.lower().encode(), request_id.encode())

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], header]
            await send(message)

        logs.request_id.set(request_id)  # of this request's task
        with server_span(scope, request_id) as span:
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                tell(span, scope, status)
                told = {"method": scope["method"], "path": scope["path"], "status": status}
                told["seconds"] = round(time.perf_counter() - began, 4)
                told["trace_id"] = tracing.trace_id() or _callers_trace(scope)
                self._log.info("request", extra={"told": told})


def server_span(scope: Scope, request_id: str) -> tracing.Span:
    """The span of a request, below that of whoever asks where they tell of one."""
    if not tracing.on():
        return tracing.OFF
    parent = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return tracing.span(scope["method"], "server", parent, request_id=request_id)


def tell(span: tracing.Span, scope: Scope, status: int) -> None:
    """What is known of a request when it is over. Of its path the route alone: an id stands for nothing in a name."""
    route = getattr(scope.get("route"), "path", "other")
    span.name(f"{scope['method']} {route}")
    span.told(**{"http.route": route, "http.response.status_code": status})
    if status >= 500:
        span.failed(str(status))


def _callers_trace(scope: Scope) -> str:
    """The id of the trace that whoever asks is in, where this process tells no spans."""
    traceparent = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1].decode() if found else ""
