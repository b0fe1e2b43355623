"""Answers held to a JSON schema: they come to their end, and what cannot be held is said."""

import json
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from services.llm.structured_outputs import check_schemas
from tests.llm.conftest import Service
from tests.llm.test_tools import WEATHER

SHAPE = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}, "round": {"type": "boolean"}},
    "required": ["colour", "round"],
    "additionalProperties": False,
}
ASKED = [{"role": "user", "content": "What is it?"}]


def wanted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def longing_for_whitespace(service: Service) -> dict[str, float]:
    """A bias towards every token that is white space, so strong that the LM writes nothing else where it may."""
    tokenizer = service.tokenizer()
    return {str(token): 100.0 for token in range(len(tokenizer)) if str(tokenizer.decode([token])).isspace()}


def test_white_space_has_an_end(service: Service) -> None:
    bias = longing_for_whitespace(service)
    assert bias
    body = {"model": "plain", "messages": ASKED, "temperature": 0, "max_tokens": 200, "logit_bias": bias}
    shape = service.post(body | wanted(SHAPE)).json()["choices"][0]
    assert shape["finish_reason"] == "stop" and set(json.loads(shape["message"]["content"])) == {"colour", "round"}
    called = service.post(body | {"tools": [WEATHER], "tool_choice": "required"}).json()["choices"][0]
    call = called["message"]["tool_calls"][0]["function"]
    assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    "price", [{"type": "integer", "multipleOf": 5}, {"type": "array", "uniqueItems": True}], ids=str
)
def test_what_cannot_be_held_is_refused_and_spoils_no_later_answer(service: Service, price: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"price": price}, "required": ["price"]}
    body = {"model": "plain", "messages": ASKED, "temperature": 0, "max_tokens": 200}
    response = service.post(body | wanted(schema))
    assert response.status_code == 400 and response.json()["error"]["param"] == "response_format"
    assert next(iter(price.keys() - {"type"})) in response.json()["error"]["message"]
    assert service.post(body | wanted(SHAPE)).status_code == 200
    assert service.post(body | {"tools": [WEATHER], "tool_choice": "required"}).status_code == 200


def test_a_tool_is_held_to_all_of_its_schema_where_it_says_strict(service: Service) -> None:
    integer = {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}
    price = {"type": "object", "properties": {"price": integer}, "required": ["price"], "additionalProperties": False}
    body = {"model": "plain", "messages": ASKED, "temperature": 0, "max_tokens": 200, "tool_choice": "required"}
    for strict in (True, None):
        tool = {"type": "function", "function": {"name": "buy", "parameters": price, "strict": strict}}
        response = service.post(body | {"tools": [tool]})
        if strict:
            assert response.status_code == 400 and "multipleOf" in response.json()["error"]["message"]
        else:
            call = response.json()["choices"][0]["message"]["tool_calls"][0]["function"]
            assert isinstance(json.loads(call["arguments"])["price"], int)


def test_a_schema_nested_too_deeply_is_refused_before_it_is_looked_through() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(2000):
        schema = {"type": "object", "properties": {"inner": schema}}
    with pytest.raises(VLLMValidationError, match="nested too deeply"):
        check_schemas(ChatCompletionRequest(model="plain", messages=ASKED, **wanted(schema)))  # pyright: ignore[reportArgumentType]
