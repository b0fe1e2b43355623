"""An OpenAI-shaped server under our control, on a real socket: the server as it may be, good and bad."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers

Behave = Callable[[dict[str, Any], int], Awaitable[Response]]


def completion(text: Any, **extra: Any) -> Response:
    """A chat completion that says `text`."""
    body = {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2},
        "system_fingerprint": "fp-1",
    }
    return Response(json.dumps(body | extra), media_type="application/json")


def text_of(body: dict[str, Any]) -> str:
    """The text of the one user turn."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


class Server:
    """Attributes:
    url: with its /v1.
    asked: how often each text was asked; of the greeting by which the asker finds out who answers, none.
    bodies, headers: every request's.
    most: requests under way at most.
    """

    def __init__(self, behave: Behave, version: str = "1") -> None:
        self.behave, self.version = behave, version
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Headers] = []
        self.times: list[float] = []
        self.under_way = self.most = 0
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self._models, methods=["GET"])
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "m", "object": "model", "version": self.version}]}

    async def _chat(self, request: Request) -> Response:
        body = json.loads(await request.body())
        text = text_of(body)
        if text == "Hello!":
            return completion("Hello!")
        self.asked[text] += 1
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.times.append(time.monotonic())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            return await self.behave(body, self.asked[text])
        finally:
            self.under_way -= 1


@contextmanager
def serving(behave: Behave, version: str = "1") -> Iterator[Server]:
    """Runs the server in a thread; a real socket, real HTTP."""
    server = Server(behave, version)
    listener = socket.create_server(("127.0.0.1", 0))
    server.port = listener.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(server.app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[listener])), daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join(10)  # whoever was killed in the middle of an answer may have left a handler that never ends
        listener.close()
