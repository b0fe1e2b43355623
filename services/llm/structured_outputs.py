"""Answers and tool calls that a grammar holds to a JSON schema."""

import json
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

NOT_HELD = (
    "multipleOf; uniqueItems, contains, minContains, maxContains; a format other than OpenAI's; pattern or format "
    "beside minLength or maxLength; propertyNames or patternProperties beside properties; allOf of several"
)


def check_schema(request: ChatCompletionRequest) -> None:
    """
    Raises:
        VLLMValidationError: (a 400 to the client) the answer's schema has keywords that the grammar would not hold.
    """
    wanted = request.extract_structured_outputs()
    if wanted and isinstance(wanted.json, dict) and has_xgrammar_unsupported_json_features(wanted.json):
        raise VLLMValidationError(
            "the JSON schema has keywords that answers cannot be held to; leave them out and check the answer for them "
            f"(these are: {NOT_HELD})",
            parameter="response_format",
        )


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
