"""Tools: what the model is told of them, and how its calls come back."""

import json
from typing import Any

import pytest

from services.llm.tools import as_text, writes_tools
from tests.llm.conftest import TEMPLATE, Service, image, image_part

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ASKED = {"role": "user", "content": "What is the weather in Rome?"}
CALLED: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."}


def test_calls_and_results_are_said_in_words() -> None:
    system, asked, called, results, thanks = as_text(
        [ASKED, CALLED, RESULT, RESULT | {"content": "22 °C"}, {"role": "user", "content": "Thanks."}], [WEATHER]
    )
    assert json.dumps(WEATHER) in system["content"] and system["role"] == "system"
    assert asked == ASKED
    assert called == {"role": "assistant", "content": CALL}
    assert results == {
        "role": "user",
        "content": "<tool_response>\nSunny.\n</tool_response>\n<tool_response>\n22 °C\n</tool_response>",
    }
    assert thanks == {"role": "user", "content": "Thanks."}


def test_a_system_message_keeps_its_words_and_an_image_its_place() -> None:
    shown = {"type": "image_embeds", "image_embeds": "…", "uuid": "…"}
    messages = [{"role": "system", "content": "Be brief."}, ASKED, CALLED, RESULT | {"content": [shown]}]
    system, _, _, result = as_text(messages, [WEATHER])
    assert system["content"].startswith("Be brief.\n\nYou may call functions")
    assert result["content"] == [
        {"type": "text", "text": "<tool_response>\n"},
        shown,
        {"type": "text", "text": "\n</tool_response>"},
    ]
    assert messages[0] == {"role": "system", "content": "Be brief."}  # the caller's own is left as it was


def test_without_tools_nothing_changes() -> None:
    messages = [ASKED, {"role": "assistant", "content": "Sunny."}]
    assert as_text(messages, None) == messages


def test_which_templates_write_tools() -> None:
    assert not writes_tools(TEMPLATE)
    assert writes_tools("{% if tools %}{{ tools | tojson }}{% endif %}")


def test_the_model_is_told(service: Service) -> None:
    body = {"model": "red", "messages": [ASKED, CALLED, RESULT], "tools": [WEATHER]}
    prompt = service.tokenizer().decode(service.post(body, "/tokenize").json()["tokens"])
    assert '"description": "The weather of a city."' in prompt
    assert CALL in prompt
    assert "<tool_response>\nSunny.\n</tool_response>" in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_fits_its_schema(service: Service, choice: object) -> None:
    content = [image_part(image(9, seed=5)), {"type": "text", "text": "?"}]
    body = {"model": "plain", "messages": [{"role": "user", "content": content}], "max_tokens": 600, "temperature": 0}
    answer = service.post(body | {"tools": [WEATHER], "tool_choice": choice}).json()
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "weather"
    assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")


def test_a_call_that_the_model_chose_to_make_is_read(service: Service) -> None:
    said = {"structured_outputs": {"choice": [CALL]}, "max_tokens": 200}
    choice = service.chat("red", [ASKED], tools=[WEATHER], **said)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}


def test_broken_calls_are_refused(service: Service) -> None:
    for calls in (5, "call", [5], [{"function": 5}], [{"type": "function"}], [{"function": {"arguments": 7}}]):
        body = {"model": "red", "messages": [ASKED, CALLED | {"tool_calls": calls}], "tools": [WEATHER]}
        response = service.post(body)
        assert response.status_code == 400, (calls, response.text)
