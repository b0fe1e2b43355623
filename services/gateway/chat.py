"""A chat request's way through: read, take its images, embed them, ask the LLM service."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request, Response

from basalt.api_errors import bad_request
from services.gateway.assistants import Assistants
from services.gateway.images import ImageIntake, StoredImage
from services.gateway.llm_client import HandoffMissed, LLMClient
from services.gateway.schema import ChatRequest, parse_chat
from services.gateway.settings import Settings
from services.gateway.vision_client import VisionClient, VisualTokens

T = TypeVar("T")

VERSION_HEADER = "X-Basalt-Version"  # NAME@HEX of the assistant that answered
CACHE_HEADER = "X-Basalt-Cache"  # of each image in order: embeddings, features or nothing
CLIENT_GONE = 499  # nobody is there to see it; it is for the log


@dataclass(frozen=True)
class Services:
    """What one request needs; made once, when the gateway starts."""

    settings: Settings
    images: ImageIntake
    assistants: Assistants
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
    version = await services.assistants.resolve(chat.model, chat.body)
    chat = chat.for_version(version)
    images = await _take_images(chat, services)
    try:
        cached = await _replace_images(chat, images, services, by_reference=services.llm.sees_handoff())
        response = await services.llm.chat(chat.encode())
    except HandoffMissed:
        cached = await _replace_images(chat, images, services, by_reference=False)
        response = await services.llm.chat(chat.encode())
    response.headers[VERSION_HEADER] = version
    if cached:
        response.headers[CACHE_HEADER] = ", ".join(cached)
    return response


async def _take_images(chat: ChatRequest, services: Services) -> dict[str, StoredImage]:
    """The request's images by URL, all fetched at the same time, equal URLs once."""
    first_of_url = {part.url: part for part in reversed(chat.images)}
    taken = [services.images.take(url, part.param) for url, part in first_of_url.items()]
    return dict(zip(first_of_url, await _all(taken), strict=True))


async def _replace_images(
    chat: ChatRequest, images: dict[str, StoredImage], services: Services, *, by_reference: bool
) -> list[str]:
    """Puts visual tokens where the images were; returns what of each image, in order, was cached."""
    param_of_url = {part.url: part.param for part in reversed(chat.images)}
    embedded = [
        services.vision.embed(chat.model, images[url], param, by_reference=by_reference)
        for url, param in param_of_url.items()
    ]
    tokens: dict[str, VisualTokens] = dict(zip(param_of_url, await _all(embedded), strict=True))
    for part in chat.images:
        part.replace(tokens[part.url].part())
    return [tokens[part.url].cached for part in chat.images]


async def _all(work: Sequence[Coroutine[None, None, T]]) -> list[T]:
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
