"""What a request to `/v1/responses` may hold: checked by this, and told by it in the OpenAPI page.

Items are checked in response_items.py, whose words are better than a validator's. Unknown fields are let through.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from services.gateway.chat_body import DETAILS, Checked, Count, NamedFunction, Sampling, TextFormat

IMAGE_URLS = "message.input_image.image_url"
LOGPROBS = "message.output_text.logprobs"

_TEXT = {"type": "string"}
_PARTS = {
    "type": "array",
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": _TEXT},
                "required": ["type", "text"],
            },
            {
                "type": "object",
                "properties": {
                    "type": {"const": "input_image"},
                    "image_url": {"type": "string", "minLength": 1},
                    "file_id": {"type": ["string", "null"]},
                    "detail": {"enum": [*DETAILS, None]},
                },
                "required": ["type", "image_url"],
            },
            {
                "type": "object",
                "properties": {"type": {"enum": ["input_image", "input_file"]}, "file_id": _TEXT | {"minLength": 1}},
                "required": ["type", "file_id"],
            },
        ]
    },
}
_CONTENT = {"anyOf": [_TEXT, _PARTS]}
ITEM = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "type": {"const": "message"},
                "role": {"enum": ["user", "assistant", "system", "developer"]},
                "content": _CONTENT,
            },
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {"type": {"const": "function_call"}, "call_id": _TEXT, "name": _TEXT, "arguments": _TEXT},
            "required": ["type", "call_id", "name", "arguments"],
        },
        {
            "type": "object",
            "properties": {"type": {"const": "function_call_output"}, "call_id": _TEXT, "output": _CONTENT},
            "required": ["type", "call_id", "output"],
        },
        {
            "type": "object",
            "properties": {"type": {"const": "item_reference"}, "id": _TEXT},
            "required": ["type", "id"],
        },
        {"type": "object", "properties": {"type": {"const": "reasoning"}}, "required": ["type"]},
    ]
}


class FunctionTool(NamedFunction):
    type: Literal["function"]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class FunctionToolChoice(NamedFunction):
    type: Literal["function"]


class AllowedFunctionTools(Checked):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionToolChoice] = Field(min_length=1)


class TextSchemaFormat(Checked):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Checked):
    format: Annotated[TextFormat | TextSchemaFormat, Field(discriminator="type")] | None = None


class ResponseBody(Sampling):
    """`POST /v1/responses`."""

    model: str = Field(min_length=1)
    input: Annotated[
        str | list[Any], WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": ITEM, "minItems": 1}]})
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionToolChoice | AllowedFunctionTools | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
