"""`/v1/responses`: OpenAI's responses, each asked as a chat of the same assistant."""

import json
import secrets
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError

from basalt.api_errors import APIError, bad_request
from basalt.api_lists import page
from basalt.auth import Caller, Guard
from basalt.object_store import ObjectStore
from basalt.record.database import Sessions
from basalt.record.responses import KeptResponse
from services.gateway import telemetry
from services.gateway.chat import VERSION_HEADER, Services, answer, read_body, while_connected
from services.gateway.kept import Kept
from services.gateway.response_body import IMAGE_URLS, LOGPROBS, ResponseBody
from services.gateway.response_events import Draft
from services.gateway.response_items import PREVIOUS, Chat, Item, kept, read_items, said
from services.gateway.schema import ChatRequest, check_chat, parse_json, told

SAMPLING = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_logprobs",
    "seed",
    "stop",
)
ELSEWHERE = {  # what OpenAI has and this has not: taken silently it would not do what it says
    "background": "ask with 'stream' instead",
    "conversation": f"go on from a response with '{PREVIOUS}' instead",
    "prompt": "send the text as 'instructions' and 'input'",
}


def router(guard: Guard, sessions: Sessions, store: ObjectStore, days: float) -> APIRouter:
    """The routes.

    Args:
        days: that a response is kept.
    """
    routes = APIRouter(prefix="/v1/responses", tags=["responses"])
    record = Kept(sessions, store, days)

    @routes.post("")
    async def create(request: Request, caller: Annotated[Caller, Depends(guard)]) -> Response:
        """Answers text and images."""
        services: Services = request.app.state.services
        telemetry.record().caller = caller.id
        await services.limits.ask(caller)
        body = read_body_of_response(await read_body(request, services))
        return await while_connected(request, respond(body, caller, services, record))

    @routes.get("/{response_id}")
    async def retrieve(
        response_id: str, caller: Annotated[Caller, Depends(guard)], stream: bool = False
    ) -> dict[str, Any]:
        """A response that was stored."""
        if stream:
            raise bad_request("'stream' is for responses in the background, which are not here", "stream")
        return await record.get(response_id, caller)

    @routes.delete("/{response_id}")
    async def delete(response_id: str, caller: Annotated[Caller, Depends(guard)]) -> dict[str, Any]:
        """Ends the conversation too, where others go on from it."""
        await record.delete(response_id, caller)
        return {"id": response_id, "object": "response", "deleted": True}

    @routes.get("/{response_id}/input_items")
    async def input_items(
        response_id: str,
        caller: Annotated[Caller, Depends(guard)],
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        include: Annotated[list[str] | None, Query(alias="include[]")] = None,
        include_plain: Annotated[list[str] | None, Query(alias="include")] = None,
    ) -> dict[str, Any]:
        """What it was an answer to, earlier turns included."""
        items = await record.items_before(response_id, caller)
        if order == "desc":
            items.reverse()
        if after is not None:
            places = [index for index, item in enumerate(items) if item["id"] == after]
            if not places:
                raise bad_request(f"'after' is none of its items: {after[:100]!r}", "after")
            items = items[places[0] + 1 :]
        shown = page(items[: limit + 1], limit)
        await record.show_images(shown["data"], IMAGE_URLS in [*(include or ()), *(include_plain or ())])
        return shown

    return routes


def read_body_of_response(raw: bytes) -> dict[str, Any]:
    """
    Raises:
        APIError: (400).
    """
    body = parse_json(raw, "'model' and 'input'")
    for name, instead in ELSEWHERE.items():
        if body.get(name):
            raise bad_request(f"'{name}' is not here: {instead}", name, "unsupported_value")
    for index, tool in enumerate(body["tools"] if isinstance(body.get("tools"), list) else ()):
        if isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind != "function":
            raise bad_request(
                f"'tools[{index}]' is of type {kind[:40]!r}; only function tools are here", "tools", "unsupported_value"
            )
    try:
        ResponseBody.model_validate(body)
    except ValidationError as error:
        raise told(error, body) from None
    return body


async def respond(body: dict[str, Any], caller: Caller, services: Services, record: Kept) -> Response:
    """Asks the chat that a request makes, and tells its answer as a response.

    Raises:
        APIError.
    """
    new = f"resp_{secrets.token_hex(24)}"
    items = await record.resolved(read_items(body["input"]), caller)
    earlier = await record.conversation(body.get(PREVIOUS), caller)
    chat, request = _chat(body, earlier, items, new, services.settings.max_images)
    try:
        answered = await answer(request, caller, services)
    except APIError as error:
        raise chat.told(error) from None
    response = _response(body, new, answered.headers[VERSION_HEADER])
    draft = Draft(response, len(items))

    async def finish() -> None:
        if response["store"]:
            response["store"] = await record.keep(response, kept(items, request.taken), caller, earlier)

    headers = {name: value for name, value in answered.headers.items() if name.startswith("x-basalt-")}
    if isinstance(answered, StreamingResponse):
        headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(answered.body_iterator, draft, finish)
        return StreamingResponse(events, 200, headers, "text/event-stream")
    deque([*draft.take(json.loads(bytes(answered.body))), *draft.close()], 0)
    await finish()
    return JSONResponse(response, 200, headers)


async def _events(
    chunks: AsyncIterable[Any], draft: Draft, finish: Callable[[], Awaitable[None]]
) -> AsyncIterator[bytes]:
    """A chat's stream as the events of a response."""
    for event in draft.begin():
        yield event
    rest = b""
    async for piece in chunks:
        *whole, rest = (rest + piece).split(b"\n\n")
        for data in (event.removeprefix(b"data: ") for event in whole):
            chunk = json.loads(data) if data != b"[DONE]" else {}
            if error := chunk.get("error"):
                yield draft.fail(error["message"])
                return
            for event in draft.take(chunk):
                yield event
    for event in draft.close():
        yield event
    await finish()
    yield draft.end()


def _chat(
    body: Mapping[str, Any], earlier: list[KeptResponse], items: list[Item], new: str, max_images: int
) -> tuple[Chat, ChatRequest]:
    """The chat that a request makes.

    Args:
        new: the id of the response; the first one's of a conversation stands for who asks, where nobody is named, so
            that all its turns are answered by one version.

    Raises:
        APIError: (400).
    """
    chat = Chat()
    if body.get("instructions"):
        chat.messages.append({"role": "system", "content": body["instructions"]})
    for turn in earlier:
        chat.add(turn.input, None)
        chat.add(said(turn.body["output"]), None)
    chat.add(items, "input")
    asked: dict[str, Any] = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    asked |= {"model": body["model"], "messages": chat.messages}
    named = body.get("user") or body.get("safety_identifier") or body.get("prompt_cache_key")
    asked["user"] = named or (earlier[0].id if earlier else new)
    if body.get("max_output_tokens"):
        asked["max_completion_tokens"] = body["max_output_tokens"]
    if body.get("stream"):
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    if LOGPROBS in (body.get("include") or ()) or body.get("top_logprobs"):
        asked["logprobs"] = True
    form = (body.get("text") or {}).get("format") or {}
    if form.get("type") == "json_schema":
        asked["response_format"] = {
            "type": "json_schema",
            "json_schema": {name: value for name, value in form.items() if name != "type"},
        }
    elif form.get("type") == "json_object":
        asked["response_format"] = form
    try:
        return chat, check_chat(asked | _tools(body), max_images)
    except APIError as error:
        raise chat.told(error) from None


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Tools and their choice, as a chat names them."""

    def named(tool: Mapping[str, Any]) -> dict[str, Any]:
        function = {name: value for name, value in tool.items() if name != "type" and value is not None}
        return {"type": "function", "function": function}

    choice = body.get("tool_choice")
    if not body.get("tools") and choice in (None, "auto", "none"):
        return {}
    asked: dict[str, Any] = {"tools": [named(tool) for tool in body.get("tools") or ()]}
    if body.get("parallel_tool_calls") is not None:
        asked["parallel_tool_calls"] = body["parallel_tool_calls"]
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        allowed = {"mode": choice["mode"], "tools": [named(tool) for tool in choice["tools"]]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
    elif isinstance(choice, dict):
        choice = named(choice)
    return asked | ({"tool_choice": choice} if choice else {})


def _response(body: Mapping[str, Any], new: str, version: str) -> dict[str, Any]:
    """OpenAI's object before the first word, with what was asked for as it is taken here."""

    def asked(name: str, default: Any = None) -> Any:
        return default if body.get(name) is None else body[name]

    return {
        "id": new,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "background": False,
        "model": version,
        "instructions": asked("instructions"),
        "previous_response_id": asked(PREVIOUS),
        "output": [],
        "max_output_tokens": asked("max_output_tokens"),
        "temperature": asked("temperature"),
        "top_p": asked("top_p"),
        "top_logprobs": asked("top_logprobs", 0),
        "presence_penalty": asked("presence_penalty"),
        "frequency_penalty": asked("frequency_penalty"),
        "parallel_tool_calls": asked("parallel_tool_calls", True),
        "tool_choice": asked("tool_choice", "auto"),
        "tools": [{"strict": None, "parameters": None} | tool for tool in asked("tools", [])],
        "text": {"format": {"type": "text"}} | {k: v for k, v in asked("text", {}).items() if v is not None},
        "reasoning": {"effort": None, "summary": None},
        "truncation": "disabled",
        "service_tier": "default",
        "store": asked("store", True),
        "user": asked("user"),
        "safety_identifier": asked("safety_identifier"),
        "prompt_cache_key": asked("prompt_cache_key"),
        "metadata": asked("metadata", {}),
        "usage": None,
    }
