"""What a chat request may hold: checked by this, and told by it in the OpenAPI page.

Fields that are not here pass on to the LLM service as they are. Messages are checked in schema.py, whose words are
better than a validator's.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

MAX_CHOICES = 16  # `n`: answers to one request
ROLES = ("developer", "system", "user", "assistant", "tool", "function")
DETAILS = ("auto", "low", "high", "original")


class Checked(BaseModel):
    """Numbers are no strings, and what is not known is let through."""

    model_config = ConfigDict(strict=True, extra="allow")


def _one_of(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": list(schemas)}


def _part(kind: str, **fields: dict[str, Any]) -> dict[str, Any]:
    properties = {"type": {"const": kind}, **fields}
    return {"type": "object", "properties": properties, "required": ["type", *fields]}


def _object(required: str, **more: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {required: {"type": "string", "minLength": 1}} | more,
        "required": [required],
    }


DETAIL = {"enum": [*DETAILS, None], "description": "Taken; a tower has one resolution."}
PARTS = {
    "type": "array",
    "items": _one_of(
        _part("text", text={"type": "string"}),
        _part("image_url", image_url=_object("url", detail=DETAIL)),
        _part("file", file=_object("file_id")),
        _part("refusal", refusal={"type": "string"}),
    ),
}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": _one_of({"type": "string"}, PARTS, {"type": "null"}),
    },
    "required": ["role"],
}


class NamedFunction(Checked):
    name: str


class Function(NamedFunction):
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(Checked):
    type: Literal["function"]
    function: Function


class FunctionChoice(Checked):
    type: Literal["function"]
    function: NamedFunction


class Allowed(Checked):
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1)


class AllowedTools(Checked):
    type: Literal["allowed_tools"]
    allowed_tools: Allowed


class JsonSchema(Checked):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Checked):
    type: Literal["text", "json_object"]


class SchemaFormat(Checked):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Checked):
    include_usage: bool | None = None


Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Sampling(Checked):
    """How words are chosen: the same in chats and responses."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]+$")], Bias] | None = None  # by token id
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    stream: bool | None = None


class ChatBody(Sampling):
    """`POST /v1/chat/completions`."""

    model: str = Field(min_length=1)
    messages: Annotated[list[Any], WithJsonSchema({"type": "array", "items": MESSAGE, "minItems": 1})]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: bool | None = None
    response_format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None = None
