"""Only the paths the gateway and an operator need answer."""

import httpx
import pytest
from fastapi import FastAPI

from services.llm.paths import OpenPaths


async def status(path: str) -> tuple[int, dict[str, object]]:
    app = FastAPI()
    app.add_api_route("/{any:path}", lambda any: {"reached": any}, methods=["POST"])
    app.add_middleware(OpenPaths)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://llm") as client:
        response = await client.post(path)
        return response.status_code, response.json()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/health"])
async def test_open(path: str) -> None:
    assert await status(path) == (200, {"reached": path.removeprefix("/")})


@pytest.mark.parametrize(
    "path", ["/inference/v1/generate", "/v1/load_lora_adapter", "/v1/chat/completions/render", "/"]
)
async def test_closed_with_an_openai_error(path: str) -> None:
    code, body = await status(path)
    assert code == 404
    error = body["error"]
    assert isinstance(error, dict)
    assert path in error["message"]
