"""A gateway-shaped HTTP server: the page and its client are tested over real HTTP, without models."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

REFUSED = "the bytes are not a JPEG, PNG, WebP, GIF, BMP or TIFF image"


@dataclass
class GatewayShaped:
    url: str = ""
    assistants: list[str] = field(default_factory=lambda: ["basalt-tiny", "other"])
    pieces: list[str] = field(default_factory=lambda: ["A red ", "circle."])
    breaks_after: int | None = None  # pieces
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the chat requests that came

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> dict[str, object]:
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "basalt"} for name in self.assistants]
            return {"object": "list", "data": data}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            body = await request.json()
            self.bodies.append(body)
            if any(
                part["type"] == "image_url" and part["image_url"]["url"].endswith("bm90IGFuIGltYWdl")
                for part in body["messages"][-1]["content"]
            ):
                error = {"message": REFUSED, "type": "invalid_request_error", "param": "messages", "code": "bad_image"}
                return JSONResponse({"error": error}, status_code=400)
            return StreamingResponse(self.events(), media_type="text/event-stream")

        return app

    async def events(self):
        for number, piece in enumerate(self.pieces):
            if number == self.breaks_after:
                yield 'data: {"error": {"message": "the llm service went away", "type": "server_error"}}\n\n'
                return
            delta = {"index": 0, "delta": {"role": "assistant", "content": piece}, "finish_reason": None}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [delta]}
            yield f"data: {json.dumps(chunk)}\n\n"
            await asyncio.sleep(0)
        yield "data: [DONE]\n\n"
