"""A server of the LLM service's shape, for what is the gateway's own: passing on, refusing, giving up.

It answers by what the last message says; it knows no images and generates nothing.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from basalt.handoff import MISSED

WORDS = ["", "Two", " dogs", " in", " the", " snow", " ❄", "."]
TOO_LONG = "This model's maximum context length is 512 tokens. However, you requested 9000 tokens."


USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 7,
    "total_tokens": 27,
    "prompt_tokens_details": {"cached_tokens": 16},
}
USAGE_EVENT = f"data: {json.dumps({'id': 'chatcmpl-1', 'choices': [], 'usage': USAGE})}\n\n".encode()
FUNCTION = {"name": "weather", "arguments": '{"city": "Rome"}'}
CALLS = {"call": {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": FUNCTION}]}}
CALL_DELTAS = [
    {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather"}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
]
FINISH = {"call": "tool_calls", "long": "length"}  # by what was said last


def is_reference(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("image_embeds")).startswith("sha256:")


def vllm_error(message: str, status: int, param: str = "input_tokens") -> JSONResponse:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": status}
    return JSONResponse({"error": error}, status)


@dataclass
class LLMShaped:
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the requests so far
    headers: list[Headers] = field(default_factory=list)
    sees_handoff: bool = False
    evicted: int = 0  # so many references more lead nowhere
    given_up: int = 0  # requests whose client went before the answer was whole

    def app(self) -> Starlette:
        chat = Route("/v1/chat/completions", self._chat, methods=["POST"])
        return Starlette(routes=[chat, Route("/health", lambda _: PlainTextResponse(""))])

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        referred = any(is_reference(part) for message in body["messages"] for part in message.get("content") or [])
        if referred and (self.evicted or not self.sees_handoff):
            self.evicted = max(0, self.evicted - 1)
            return vllm_error("no embeddings lie there", 400, MISSED)
        self.bodies.append(body)
        self.headers.append(request.headers)
        content = body["messages"][-1].get("content")
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content or []]
        said = texts[-1] if texts else ""
        match said:
            case "too long":
                return vllm_error(TOO_LONG, 400)
            case "crash":
                return PlainTextResponse("Traceback: secret", 500)
            case "engine dead":
                return vllm_error("EngineCore died", 503)
            case "not ours":
                return JSONResponse({"detail": "Not Found"}, 404)
            case "hang":
                await self._hang(request)
            case "slow":
                await asyncio.sleep(0.2)
        if body.get("stream"):
            usage = (body.get("stream_options") or {}).get("include_usage")
            return StreamingResponse(self._events(said, usage), media_type="text/event-stream")
        return JSONResponse(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "".join(WORDS)} | CALLS.get(said, {}),
                        "finish_reason": FINISH.get(said, "stop"),
                        "logprobs": None,
                    }
                ],
                "usage": USAGE,
            }
        )

    async def _hang(self, request: Request) -> None:
        while not await request.is_disconnected():  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(0.05)
        self.given_up += 1

    async def _events(self, said: str, usage: bool) -> AsyncIterator[bytes]:
        try:
            for delta in CALL_DELTAS if said in CALLS else ():
                yield chunk(delta, None)
            words = WORDS[:1] if said in CALLS else WORDS
            for index, word in enumerate(words):
                yield event(word, FINISH.get(said, "stop") if index == len(words) - 1 else None)
                if said == "stall":
                    await asyncio.sleep(600)
                if said == "break" and index == 2:
                    raise RuntimeError("breaks off here")
            if usage:
                yield USAGE_EVENT
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.given_up += 1
            raise


def event(word: str, finish: str | None) -> bytes:
    return chunk({"role": "assistant", "content": word} if not word else {"content": word}, finish)


def chunk(delta: dict[str, Any], finish: str | None) -> bytes:
    told = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "one",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n".encode()


STREAM = b"".join(event(w, "stop" if i == len(WORDS) - 1 else None) for i, w in enumerate(WORDS)) + b"data: [DONE]\n\n"
