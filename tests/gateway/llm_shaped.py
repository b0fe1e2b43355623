"""A server of the LLM service's shape, for what is the gateway's own: passing on, refusing, giving up.

It answers by what the last message says; it knows no images and generates nothing.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from basalt.handoff import MISSED

WORDS = ["", "Two", " dogs", " in", " the", " snow", " ❄", "."]
TOO_LONG = "This model's maximum context length is 512 tokens. However, you requested 9000 tokens."


def is_reference(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("image_embeds")).startswith("sha256:")


def vllm_error(message: str, status: int, param: str = "input_tokens") -> JSONResponse:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": status}
    return JSONResponse({"error": error}, status)


@dataclass
class LLMShaped:
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the requests so far
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
        content = body["messages"][-1].get("content")
        said = content if isinstance(content, str) else ""
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
            return StreamingResponse(self._events(said), media_type="text/event-stream")
        return JSONResponse(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "".join(WORDS)},
                        "finish_reason": "stop",
                        "logprobs": None,
                    }
                ],
                "usage": {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27},
            }
        )

    async def _hang(self, request: Request) -> None:
        while not await request.is_disconnected():  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(0.05)
        self.given_up += 1

    async def _events(self, said: str) -> AsyncIterator[bytes]:
        try:
            for index, word in enumerate(WORDS):
                yield event(word, "stop" if index == len(WORDS) - 1 else None)
                if said == "stall":
                    await asyncio.sleep(600)
                if said == "break" and index == 2:
                    raise RuntimeError("breaks off here")
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.given_up += 1
            raise


def event(word: str, finish: str | None) -> bytes:
    delta = {"role": "assistant", "content": word} if not word else {"content": word}
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "one",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


STREAM = b"".join(event(w, "stop" if i == len(WORDS) - 1 else None) for i, w in enumerate(WORDS)) + b"data: [DONE]\n\n"
