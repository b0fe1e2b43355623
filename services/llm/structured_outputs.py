"""Answers and tool calls that a grammar holds to a JSON schema."""

import json
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import check_json_nesting
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

NOT_HELD = (
    "multipleOf; uniqueItems, contains, minContains, maxContains; a format other than OpenAI's; pattern or format "
    "beside minLength or maxLength; propertyNames or patternProperties beside properties; allOf of several"
)


def check_schemas(request: ChatCompletionRequest) -> None:
    """Of the answer, and of the tools that are asked to be strict; other calls are held to what can be.

    Raises:
        VLLMValidationError: (a 400 to the client) one has keywords that the grammar would not hold, or is nested too
            deeply to be looked through.
    """
    wanted = request.extract_structured_outputs()
    schemas = [("response_format", wanted.json if wanted else None)]
    schemas += [("tools", tool.function.parameters) for tool in request.tools or () if tool.function.strict]
    for parameter, schema in schemas:
        check_json_nesting(schema)
        if isinstance(schema, dict) and has_xgrammar_unsupported_json_features(schema):
            raise VLLMValidationError(
                "the JSON schema has keywords that answers cannot be held to; leave them out and check the answer for "
                f"them (these are: {NOT_HELD})",
                parameter=parameter,
            )


def pin_arguments(request: ChatCompletionRequest) -> None:
    """Where a call must be made its arguments fit their schema, as if `strict` had been asked for; vLLM would take any
    JSON there. Of a call that the model chooses to make, only where it was asked for: not every schema can be held."""
    if request.tool_choice in (None, "none", "auto"):
        return
    for tool in request.tools or ():
        if tool.function.strict is None:
            tool.function.strict = True


def bound_whitespace(request: ChatCompletionRequest) -> None:
    """At most one character of white space between two words of a tool call's arguments. For a request that has the
    grammar of its tools already: xgrammar's structural tag."""
    held = request.structured_outputs
    if held and held.structural_tag:
        held.structural_tag = json.dumps(_bounded(json.loads(held.structural_tag)))


def _bounded(tag: Any) -> Any:
    """The tag, or a part of it, with the bound on each JSON schema in it."""
    if isinstance(tag, list):
        return [_bounded(part) for part in tag]
    if not isinstance(tag, dict):
        return tag
    bounded = {key: part if key == "json_schema" else _bounded(part) for key, part in tag.items()}
    return bounded | ({"max_whitespace_cnt": 1} if tag.get("type") == "json_schema" else {})
