"""The LLM service: vLLM's OpenAI server, over HTTP."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import aiohttp
from fastapi import Response
from fastapi.responses import StreamingResponse

from basalt import tracing
from basalt.api_errors import APIError, failed, timed_out, unavailable
from basalt.handoff import MISSED
from basalt.logs import REQUEST_ID_HEADER
from services.gateway import telemetry
from services.gateway.telemetry import Record

log = logging.getLogger("basalt.gateway")

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 4.0  # uvicorn closes idle connections after 5: never use one that is just being closed
INLINE_SECONDS = 60.0  # after a reference was not found, embeddings go along with the request


class HandoffMissed(Exception):
    """The LLM service does not find embeddings that the vision service has left in the hand-off directory: it is
    another machine's, or they had to go."""


class LLMClient:
    """`close` at the end. Connections that break are made anew by the next request."""

    def __init__(self, url: str, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        self._inline_until = 0.0
        # aiohttp: httpx looks at every idle connection for every request, which costs more than the request.
        self._http = aiohttp.ClientSession(
            url.rstrip("/") + "/",
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence_seconds),
            headers={"Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        await self._http.close()

    async def ready(self) -> bool:
        try:
            async with self._http.get("health", timeout=aiohttp.ClientTimeout(CONNECT_SECONDS)) as health:
                return health.ok
        except (aiohttp.ClientError, TimeoutError):
            return False

    def sees_handoff(self) -> bool:
        """Whether references are worth trying."""
        return time.monotonic() >= self._inline_until

    def hand_inline(self) -> None:
        """For a while they are not."""
        self._inline_until = time.monotonic() + INLINE_SECONDS

    async def chat(self, body: bytes, *, show_usage: bool) -> Response:
        """The service's answer: its JSON, or its event stream byte for byte as it comes.

        Args:
            body: the chat request; a stream's must ask for its usage.
            show_usage: whether a stream's usage is the client's to see.

        Raises:
            HandoffMissed: embeddings it was referred to are not there.
            APIError: what the service refused (its own 4xx); 502, 503.
        """
        record = telemetry.record()
        # Clients may use an id twice; to the service it must be one request's.
        headers = {"Content-Type": "application/json", REQUEST_ID_HEADER: f"{record.id}-{uuid4().hex[:8]}"}
        try:
            with telemetry.stage("llm", "client"):
                headers |= tracing.headers()
                async with asyncio.timeout(self._silence_seconds):  # of sending, too, which aiohttp has no limit for
                    upstream = await self._http.post("v1/chat/completions", data=body, headers=headers)
            if upstream.ok and upstream.content_type == "text/event-stream":
                return self._stream(upstream, record, show_usage)
            async with upstream:
                content = await upstream.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._told(error) from None
        if upstream.ok:
            record.first_token()
            record.used(_usage(content))
            return Response(content, media_type="application/json")
        if (_error_of(content) or {}).get("param") == MISSED:
            raise HandoffMissed
        raise _refusal(upstream.status, content)

    def _stream(self, upstream: aiohttp.ClientResponse, record: Record, show_usage: bool) -> StreamingResponse:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        record.held.callback(upstream.close)  # also where the client went before the first event
        events = self._events(upstream, record, show_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _events(self, upstream: aiohttp.ClientResponse, record: Record, show_usage: bool) -> AsyncIterator[bytes]:
        """Whole events as they come."""
        sent, usage = 0, None
        rest = b""
        span = tracing.span("first_token")
        try:
            async for chunk in upstream.content.iter_any():
                whole, end, rest = (rest + chunk).rpartition(b"\n\n")
                events = whole + end
                if not sent and events:
                    record.first_token()
                    span.end()
                    span = tracing.span("stream")
                sent += events.count(b"data: ")
                if told := _USAGE_EVENT.search(events):
                    usage = _usage(told[1])
                    events = events if show_usage else events.replace(told[0], b"")
                if events:
                    yield events
        except (
            aiohttp.ClientError,
            TimeoutError,
        ) as error:  # the status is sent already: what happened is told as an event
            yield b"data: " + json.dumps(self._told(error).body()).encode() + b"\n\ndata: [DONE]\n\n"
        finally:
            # An answer that was broken off has not told its usage: each event was a token, more or less.
            record.used(usage or {"completion_tokens": sent})
            span.end()
            upstream.close()

    def _told(self, error: aiohttp.ClientError | TimeoutError) -> APIError:
        log.warning("llm: %s: %s", type(error).__name__, error)
        if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
            return timed_out("llm", self._silence_seconds)
        return unavailable("llm")


# The last event before [DONE]. Within a text these quotation marks would be escaped.
_USAGE_EVENT = re.compile(rb'data: ([^\n]*"choices":\s*\[\][^\n]*)\n\n')


def _usage(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    usage = body.get("usage") if isinstance(body, dict) else None
    return usage if isinstance(usage, dict) else {}


def _refusal(status: int, content: bytes) -> APIError:
    """vLLM's own refusal in OpenAI's shape; anything else it may say stays in our log."""
    error = _error_of(content)
    if status == 503:
        return unavailable("llm")
    if error is None or status not in (400, 404, 413, 422, 429):
        log.error("llm: status %d: %s", status, content[:500])
        return failed("llm")
    message = str(error["message"])
    code = error.get("code")
    too_long = "maximum context length" in message or "maximum model length" in message
    return APIError(
        status,
        message,
        type=str(error.get("type") or "invalid_request_error"),
        param=None if error.get("param") is None else str(error["param"]),
        code="context_length_exceeded" if too_long else code if isinstance(code, str) else None,
    )


def _error_of(content: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(content)
    except ValueError:
        return None
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) and "message" in error else None
