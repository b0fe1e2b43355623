"""The OpenAPI page. Bodies are read raw and answers passed on as they come, so both are told here, in one table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from services.gateway.chat_body import ChatBody
from services.gateway.response_body import ResponseBody

DESCRIPTION = """\
OpenAI's API for assistants that see. `model` is `NAME`, `NAME@ALIAS` or `NAME@VERSION`; `GET /v1/models` lists the
names. Every answer has `X-Request-Id` (yours, if you sent one); answers of assistants have `X-Basalt-Version`, and
`X-Basalt-Cache` where there were images. Every error is `{"error": {"message", "type", "param", "code"}}`."""


class Told(BaseModel):
    """More fields than those named may come."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(BaseModel):
    message: str  # what was wrong, and what would be right
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Model(Told):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: str | None = None  # sha256:…, that the name means now


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class CalledFunction(Told):
    name: str
    arguments: str


class Call(Told):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Told):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[Call] | None = None


class Choice(Told):
    index: int
    message: AssistantMessage
    finish_reason: str | None
    logprobs: dict[str, Any] | None = None


class CachedTokens(Told):
    cached_tokens: int | None = None


class Usage(Told):
    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class ChatCompletion(Told):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str  # NAME@VERSION that answered
    choices: list[Choice]
    usage: Usage


class OutputText(Told):
    type: Literal["output_text"]
    text: str


class OutputMessage(Told):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: str
    content: list[OutputText]


class FunctionCall(Told):
    id: str
    type: Literal["function_call"]
    status: str
    call_id: str
    name: str
    arguments: str


class InputTokens(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokens(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class ResponseObject(Told):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage | FunctionCall]
    usage: ResponseUsage | None
    previous_response_id: str | None
    store: bool


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ListedItem(Told):
    id: str
    type: str


class ItemList(BaseModel):
    object: Literal["list"]
    data: list[ListedItem]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Status(BaseModel):
    status: str


@dataclass(frozen=True)
class Operation:
    """What FastAPI cannot see of one.

    Attributes:
        answer: None where FastAPI has it from the code.
        errors: the statuses it may answer beside those that any may.
        examples: of requests, by what they show.
    """

    tag: str
    answer: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    streams: bool = False
    errors: Sequence[int] = ()
    examples: dict[str, Any] = field(default_factory=dict)


IMAGE = "https://example.org/cat.jpg"
QUESTION = "What is in the picture?"
ASKING = (400, 404, 408, 413, 429, 502, 504)
CHAT = {
    "an image": {
        "model": "basalt-tiny",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": QUESTION}],
            }
        ],
    },
    "text, as it is written": {
        "model": "basalt-tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
}
RESPONSE = {
    "an image": {
        "model": "basalt-tiny",
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": QUESTION}],
            }
        ],
    },
    "going on": {"model": "basalt-tiny", "input": "And what colour is it?", "previous_response_id": "resp_…"},
}
UPLOAD = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP or GIF"},
        "purpose": {"enum": ["vision", "user_data"]},
    },
    "required": ["file", "purpose"],
}

EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "contentMediaType": "application/json"}},
    "required": ["data"],
}

OPERATIONS = {
    ("post", "/v1/chat/completions"): Operation("chat", ChatCompletion, ChatBody, True, ASKING, CHAT),
    ("get", "/v1/models"): Operation("models", Models, errors=(502, 504)),
    ("get", "/v1/models/{name}"): Operation("models", Model, errors=(404, 502, 504)),
    ("post", "/v1/responses"): Operation("responses", ResponseObject, ResponseBody, True, ASKING, RESPONSE),
    ("get", "/v1/responses/{response_id}"): Operation("responses", ResponseObject, errors=(400, 404)),
    ("delete", "/v1/responses/{response_id}"): Operation("responses", ResponseDeleted, errors=(404,)),
    ("get", "/v1/responses/{response_id}/input_items"): Operation("responses", ItemList, errors=(400, 404)),
    ("post", "/v1/files"): Operation("files", errors=(400, 408, 413, 429)),
    ("get", "/v1/files"): Operation("files", errors=(400, 404)),
    ("get", "/v1/files/{file_id}"): Operation("files", errors=(404,)),
    ("get", "/v1/files/{file_id}/content"): Operation("files", errors=(404,)),
    ("delete", "/v1/files/{file_id}"): Operation("files", errors=(404,)),
    ("get", "/healthz"): Operation("service", Status),
    ("get", "/readyz"): Operation("service", Status),
    ("get", "/metrics"): Operation("service"),
}
MEANING = {
    400: "Something is wrong with the request.",
    401: "An API key is needed, and this is none.",
    403: "The API key may not do this.",
    404: "There is no such thing, or it is another's.",
    408: "The request did not arrive whole in time.",
    413: "The request, or an image, is too large.",
    429: "The API key's limit is reached; see Retry-After.",
    502: "A service behind failed on this.",
    503: "A service behind is not there; see Retry-After.",
    504: "A service behind did not answer in time.",
}


def install(app: FastAPI) -> None:
    """Makes the page of `app` whole."""

    def page() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _whole(app)
        return app.openapi_schema

    app.openapi = page


def _whole(app: FastAPI) -> dict[str, Any]:
    page = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=DESCRIPTION, routes=app.routes
    )
    models = {model for each in OPERATIONS.values() for model in (each.answer, each.body) if model} | {Error}
    wanted: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (model, "validation") for model in sorted(models, key=lambda model: model.__name__)
    ]
    _, schemas = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    components = page.setdefault("components", {})
    components["schemas"] = components.get("schemas", {}) | schemas["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    for name in [name for name in components["schemas"] if name.startswith("Body_")]:
        del components["schemas"][name]
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "`basalt keys create`"}}
    for path, operations in page["paths"].items():
        for method, told in operations.items():
            _tell(told, OPERATIONS[method, path])
    return page


def _tell(told: dict[str, Any], operation: Operation) -> None:
    told["tags"] = [operation.tag]
    answers = told["responses"]
    answers.pop("422", None)
    if operation.answer:
        answers["200"]["content"] = {"application/json": {"schema": _reference(operation.answer)}}
    if operation.streams:
        answers["200"]["content"]["text/event-stream"] = {"schema": EVENT}
    if operation.body:
        content: dict[str, Any] = {"schema": _reference(operation.body)}
        if operation.examples:
            content["examples"] = {name: {"value": value} for name, value in operation.examples.items()}
        told["requestBody"] = {"required": True, "content": {"application/json": content}}
    guarded = operation.tag != "service"
    if guarded:
        told["security"] = [{}, {"key": []}]  # on loopback none is needed
    for status in sorted({*operation.errors, 503, *((401, 403) if guarded else ())}):
        content = {"application/json": {"schema": _reference(Error)}}
        answers[str(status)] = {"description": MEANING[status], "content": content}
    if told["operationId"].startswith("content"):
        answers["200"]["content"] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    if operation.tag == "files" and told["operationId"].startswith("upload"):
        told["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD}}}
    if "/metrics" in told["operationId"] or told["operationId"].startswith("metrics"):
        answers["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
