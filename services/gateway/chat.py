"""A chat request's way through: read, take its images, embed them, ask the LLM service."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request, Response

from basalt.api_errors import bad_request
from services.gateway.images import ImageIntake
from services.gateway.llm_client import LLMClient
from services.gateway.schema import ChatRequest, ImagePart, parse_chat
from services.gateway.settings import Settings
from services.gateway.vision_client import VisionClient, VisualTokens

T = TypeVar("T")

CLIENT_GONE = 499  # nobody is there to see it; it is for the log


@dataclass(frozen=True)
class Services:
    """What one request needs; made once, when the gateway starts."""

    settings: Settings
    images: ImageIntake
    vision: VisionClient
    llm: LLMClient

    async def close(self) -> None:
        await self.images.close()
        await self.vision.close()
        await self.llm.close()


async def complete(request: Request, services: Services) -> Response:
    """Answers POST /v1/chat/completions.

    Raises:
        APIError.
    """
    settings = services.settings
    raw = await _read_body(request, settings)
    chat = parse_chat(raw, settings.max_images)
    return await _while_connected(request, _answer(chat, services))


async def _answer(chat: ChatRequest, services: Services) -> Response:
    await services.vision.check_model(chat.model)
    await _replace_images(chat, services)
    return await services.llm.chat(chat.encode())


async def _replace_images(chat: ChatRequest, services: Services) -> None:
    """Puts visual tokens where the images were; all images at the same time, equal URLs once."""
    first_of_url: dict[str, ImagePart] = {}
    for part in chat.images:
        first_of_url.setdefault(part.url, part)

    async def embed(part: ImagePart) -> VisualTokens:
        image = await services.images.take(part.url, part.param)
        return await services.vision.embed(chat.model, image, part.param)

    tokens = dict(zip(first_of_url, await _all([embed(part) for part in first_of_url.values()]), strict=True))
    for part in chat.images:
        part.replace(tokens[part.url].part())


async def _all(work: list[Coroutine[None, None, T]]) -> list[T]:
    """Results in order; the first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _read_body(request: Request, settings: Settings) -> bytes:
    too_large = bad_request(
        f"the request has more than {settings.max_request_bytes:,} bytes: send fewer or smaller images",
        code="request_too_large",
        status=413,
    )
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.max_request_bytes:
                    raise too_large
    except TimeoutError:
        raise bad_request(
            f"the request did not arrive whole within {settings.body_seconds:g} seconds", code="timeout", status=408
        ) from None
    return bytes(body)


async def _while_connected(request: Request, work: Coroutine[None, None, Response]) -> Response:
    """Does the work for as long as the client stays; nobody is waiting for an answer that goes nowhere."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_GONE)
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
