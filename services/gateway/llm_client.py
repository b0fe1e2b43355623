"""The LLM service: vLLM's OpenAI server, over HTTP."""

import json
import logging
import re
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
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
INLINE_SECONDS = 60.0  # after a reference was not found, embeddings go along with the request


class HandoffMissed(Exception):
    """The LLM service does not find embeddings that the vision service has left in the hand-off directory: it is
    another machine's, or they had to go."""


class LLMClient:
    """`close` at the end. Connections that break are made anew by the next request."""

    def __init__(self, url: str, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        self._inline_until = 0.0
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(CONNECT_SECONDS, read=silence_seconds, write=30.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def ready(self) -> bool:
        try:
            return (await self._http.get("/health", timeout=CONNECT_SECONDS)).is_success
        except httpx.HTTPError:
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
                request = self._http.build_request("POST", "/v1/chat/completions", content=body, headers=headers)
                upstream = await self._http.send(request, stream=True)
            if upstream.is_success and upstream.headers.get("content-type", "").startswith("text/event-stream"):
                return self._stream(upstream, record, show_usage)
            try:
                content = await upstream.aread()
            finally:
                await upstream.aclose()
        except httpx.HTTPError as error:
            raise self._told(error) from None
        if upstream.is_success:
            record.first_token()
            record.used(_usage(content))
            return Response(content, media_type="application/json")
        if (_error_of(content) or {}).get("param") == MISSED:
            raise HandoffMissed
        raise _refusal(upstream.status_code, content)

    def _stream(self, upstream: httpx.Response, record: Record, show_usage: bool) -> StreamingResponse:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        record.held.push_async_callback(upstream.aclose)  # also where the client went before the first event
        events = self._events(upstream, record, show_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _events(self, upstream: httpx.Response, record: Record, show_usage: bool) -> AsyncIterator[bytes]:
        """Whole events as they come."""
        sent, usage = 0, None
        rest = b""
        span = tracing.span("first_token")
        try:
            async for chunk in upstream.aiter_raw():
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
        except httpx.HTTPError as error:  # the status is sent already: what happened is told as an event
            yield b"data: " + json.dumps(self._told(error).body()).encode() + b"\n\ndata: [DONE]\n\n"
        finally:
            # An answer that was broken off has not told its usage: each event was a token, more or less.
            record.used(usage or {"completion_tokens": sent})
            span.end()
            await upstream.aclose()

    def _told(self, error: httpx.HTTPError) -> APIError:
        log.warning("llm: %s: %s", type(error).__name__, error)
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
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
