"""A chat request's way through: read, take its images, embed them, ask the LLM service."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request, Response

from basalt.api_errors import bad_request, failed
from basalt.auth import Caller
from services.gateway import telemetry
from services.gateway.assistants import Assistants
from services.gateway.images import ImageIntake, StoredImage
from services.gateway.limits import Buckets, FairQueue, Limits, Room
from services.gateway.llm_client import HandoffMissed, LLMClient
from services.gateway.schema import ChatRequest, Source, parse_chat
from services.gateway.settings import Settings
from services.gateway.sources import Sources
from services.gateway.telemetry import Record
from services.gateway.vision_client import VisionClient, VisualTokens

T = TypeVar("T")

VERSION_HEADER = "X-Basalt-Version"  # NAME@HEX of the assistant that answered
CACHE_HEADER = "X-Basalt-Cache"  # of each image in order: embeddings, features or nothing
IGNORED_HEADER = "X-Basalt-Ignored"  # what was asked for and makes no difference here
CLIENT_GONE = 499  # nobody is there to see it; it is for the log


@dataclass(frozen=True)
class Services:
    """What one request needs; made once, when the gateway starts."""

    settings: Settings
    images: ImageIntake
    sources: Sources
    assistants: Assistants
    vision: VisionClient
    llm: LLMClient
    buckets: Buckets
    limits: Limits
    queue: FairQueue
    room: Room

    async def close(self) -> None:
        await self.images.close()
        await self.vision.close()
        await self.llm.close()
        await self.buckets.close()


async def complete(request: Request, caller: Caller, services: Services) -> Response:
    """Answers POST /v1/chat/completions.

    Raises:
        APIError.
    """
    telemetry.record().caller = caller.id
    await services.limits.ask(caller)
    raw = await read_body(request, services)
    chat = parse_chat(raw, services.settings.max_images)
    return await while_connected(request, answer(chat, caller, services))


async def answer(chat: ChatRequest, caller: Caller, services: Services) -> Response:
    """The LLM's answer. The caller's turn lasts until the last of it is sent.

    Raises:
        APIError.
    """
    record = telemetry.record()
    version = await services.assistants.resolve(chat.model, chat.body)
    record.assistant, record.images = version.partition("@")[0], len(chat.images)
    chat = chat.for_version(version)
    images = await _take_images(chat, caller, services)  # before its turn: others' need not wait for slow URLs
    with telemetry.stage("queue"):
        turn = services.queue.turn(caller.id, services.limits.of(caller, "concurrent_requests"))
        await record.held.enter_async_context(turn)
    record.held.push_async_callback(_count_tokens, record, caller, services.limits)
    chat.taken.update({source: image.id for source, image in images.items()})
    response, cached = await _ask(chat, images, services)
    response.headers[VERSION_HEADER] = version
    if cached:
        response.headers[CACHE_HEADER] = ", ".join(cached)
    if chat.ignored:
        response.headers[IGNORED_HEADER] = ", ".join(chat.ignored)
    return response


async def _ask(chat: ChatRequest, images: dict[Source, StoredImage], services: Services) -> tuple[Response, list[str]]:
    """The answer, and what of each image in order was cached.

    References that are remembered of earlier requests may lead nowhere by now: then the vision service is asked. Where
    what it has just left is not found either, the LLM service looks elsewhere, and embeddings go along.
    """
    while True:
        by_reference = services.llm.sees_handoff()
        with telemetry.stage("vision", "client"):
            tokens = await _replace_images(chat, images, services, by_reference=by_reference)
        try:
            response = await services.llm.chat(chat.encode(), show_usage=chat.wants_usage)
            return response, [each.cached for each in tokens]
        except HandoffMissed:
            if not by_reference:
                raise failed("llm") from None
            if not services.vision.forget(chat.model, tokens):
                services.llm.hand_inline()


async def _count_tokens(record: Record, caller: Caller, limits: Limits) -> None:
    await limits.used(caller, record.prompt_tokens + record.completion_tokens)


async def _take_images(chat: ChatRequest, caller: Caller, services: Services) -> dict[Source, StoredImage]:
    """The request's images, all fetched at the same time, equal ones once."""
    first = {part.source: part for part in reversed(chat.images)}
    taken = await _all([services.sources.take(source, part.param, caller) for source, part in first.items()])
    size = sum(len(image.data) for image in taken)
    services.room.take(size)
    telemetry.record().held.callback(services.room.give_back, size)
    return dict(zip(first, taken, strict=True))


async def _replace_images(
    chat: ChatRequest, images: dict[Source, StoredImage], services: Services, *, by_reference: bool
) -> list[VisualTokens]:
    """Puts visual tokens where the images were; returns those of each image, in order."""
    params = {part.source: part.param for part in reversed(chat.images)}
    embedded = [
        services.vision.embed(chat.model, images[source], param, by_reference=by_reference)
        for source, param in params.items()
    ]
    tokens: dict[Source, VisualTokens] = dict(zip(params, await _all(embedded), strict=True))
    for part in chat.images:
        part.replace(tokens[part.source].part())
    return [tokens[part.source] for part in chat.images]


async def _all(work: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """Results in order; the first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def read_body(request: Request, services: Services) -> bytes:
    settings, held = services.settings, telemetry.record().held
    too_large = bad_request(
        f"the request has more than {settings.max_request_bytes:,} bytes: send fewer or smaller images",
        code="request_too_large",
        status=413,
    )
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                services.room.take(len(chunk))
                held.callback(services.room.give_back, len(chunk))
                body += chunk
                if len(body) > settings.max_request_bytes:
                    raise too_large
    except TimeoutError:
        raise bad_request(
            f"the request did not arrive whole within {settings.body_seconds:g} seconds", code="timeout", status=408
        ) from None
    return bytes(body)


async def while_connected(request: Request, work: Coroutine[None, None, Response]) -> Response:
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
