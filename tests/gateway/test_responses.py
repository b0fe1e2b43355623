"""`/v1/responses` with OpenAI's client: what the LLM service is asked, and what the client is told."""

import json
import re
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from basalt.record.database import open_database
from basalt.record.responses import KeptResponse
from tests.gateway.conftest import Stack, wait_for
from tests.gateway.llm_shaped import USAGE, WORDS
from tests.gateway.test_chat import data_url, error, photos
from tests.tiny import picture

SAID = "".join(WORDS)
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False}


@pytest.fixture
def responses(stack: Stack):
    return stack.client().responses


def shown(url: str, text: str = "What is it?", **more: Any) -> list[dict[str, Any]]:
    image = {"type": "input_image", "image_url": url, "detail": "auto"} | more
    return [{"role": "user", "content": [image, {"type": "input_text", "text": text}]}]


def asked(stack: Stack) -> dict[str, Any]:
    return stack.llm.bodies[-1]


def test_a_text_is_a_chat_of_one_message(stack: Stack, responses):
    told = responses.create(
        model="one",
        input="Hello",
        instructions="Be brief.",
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.9,
        metadata={"topic": "test"},
        user="somebody",
    )
    assert asked(stack) | {"model": "one"} == {
        "model": "one",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "max_completion_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "somebody",
    }
    assert told.output_text == SAID and told.status == "completed" and told.error is None
    assert told.usage.input_tokens == 20 and told.usage.output_tokens == 7 and told.usage.total_tokens == 27
    assert told.usage.input_tokens_details.cached_tokens == USAGE["prompt_tokens_details"]["cached_tokens"]
    assert told.metadata == {"topic": "test"} and told.temperature == 0.5 and told.max_output_tokens == 50
    assert re.fullmatch(r"one@[0-9a-f]{64}", told.model)
    assert told._request_id
    again = responses.retrieve(told.id)
    assert again == told


def test_an_image_is_the_same_to_the_model_as_in_a_chat(stack: Stack, responses):
    data = picture(500)
    stack.ask([{"type": "image_url", "image_url": {"url": data_url(data)}}, {"type": "text", "text": "What is it?"}])
    chat = asked(stack)["messages"]
    responses.create(model="one", input=shown(data_url(data)))
    assert asked(stack)["messages"] == chat
    file = stack.client().files.create(file=("a.png", data), purpose="vision")
    by_file = {"type": "input_image", "file_id": file.id, "detail": "high"}
    raw = responses.with_raw_response.create(model="one", input=[{"role": "user", "content": [by_file]}])
    assert asked(stack)["messages"][0]["content"] == chat[0]["content"][:1]
    assert raw.headers["X-Basalt-Cache"] == "embeddings"
    with photos(data) as (url, _):
        responses.create(model="one", input=shown(f"{url}/0"))
    assert asked(stack)["messages"] == chat


def test_a_conversation_goes_on_with_its_images(stack: Stack, responses):
    with photos(picture(501)) as (url, fetched):
        first = responses.create(model="one", input=shown(f"{url}/0"), instructions="Be brief.", user="a")
        embedded = asked(stack)["messages"][1]["content"][0]
        second = responses.create(model="one", input="And now?", previous_response_id=first.id)
    assert fetched == ["/0"]
    question = {"role": "user", "content": [embedded, {"type": "text", "text": "What is it?"}]}
    turns = [question, {"role": "assistant", "content": SAID}, {"role": "user", "content": "And now?"}]
    assert asked(stack)["messages"] == turns  # without the instructions, as OpenAI
    assert second.previous_response_id == first.id
    third = responses.create(
        model="one", input=shown(data_url(picture(502)), "And this?"), previous_response_id=second.id
    )
    assert asked(stack)["user"] == first.id
    assert [message["role"] for message in asked(stack)["messages"]] == ["user", "assistant"] * 2 + ["user"]

    items = responses.input_items.list(third.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant"] * 2 + ["user"]
    assert items[0].content[0].image_url is None
    whole = responses.input_items.list(third.id, include=["message.input_image.image_url"]).data
    assert whole[0].content[0].image_url.startswith("data:image/") and whole[0].content[1].text == "And this?"
    assert whole[-1].content[0].image_url.endswith("/0")
    page = responses.input_items.list(third.id, limit=2)
    assert page.has_more and [item.id for item in page] == [item.id for item in reversed(items)]

    responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="was deleted") as gone:
        responses.create(model="one", input="?", previous_response_id=second.id)
    assert gone.value.param == "previous_response_id"


def test_what_is_not_stored_cannot_be_had_again(responses, stack: Stack):
    told = responses.create(model="one", input="Hello", store=False)
    assert told.store is False
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(told.id)


def test_records_hold_no_image_bytes_and_expire(start):
    stack = start(response_days=1e-9)
    database = open_database(f"sqlite:///{stack.vision.store.parent / 'basalt.db'}")
    told = stack.client().responses.create(model="one", input=shown(data_url(picture(503))))
    with database() as session:
        kept = session.get_one(KeptResponse, told.id)
    assert "base64" not in json.dumps([kept.input, kept.body])
    assert kept.input[0]["content"][0]["image"].startswith("sha256:")
    with pytest.raises(openai.NotFoundError):
        stack.client().responses.retrieve(told.id)
    stack.client().responses.create(model="one", input="Hello")
    with database() as session:
        assert session.get(KeptResponse, told.id) is None


def test_streaming_tells_openais_events(stack: Stack, responses):
    events = list(responses.create(model="one", input="Hello", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[4:-4] == ["response.output_text.delta"] * (len(WORDS) - 1)
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events[4:-4]) == SAID == events[-4].text
    assert events[0].response.status == "in_progress" and not events[0].response.output
    done = events[-1].response
    assert done.output_text == SAID and done.usage.total_tokens == 27
    assert responses.retrieve(done.id) == done
    with responses.stream(model="one", input="Hello") as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == SAID
        assert stream.get_final_response().output_text == SAID


def test_tools_are_called_and_answered(stack: Stack, responses):
    told = responses.create(model="one", input="call", tools=[WEATHER], tool_choice="required")
    function = {name: WEATHER[name] for name in ("name", "parameters", "strict")}
    assert asked(stack)["tools"] == [{"type": "function", "function": function}]
    assert asked(stack)["tool_choice"] == "required"
    call = told.output[0]
    assert (call.type, call.name, call.arguments, call.call_id) == (
        "function_call",
        "weather",
        '{"city": "Rome"}',
        "call_1",
    )
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    made = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "content": "Sunny.", "tool_call_id": "call_1"},
    ]
    responses.create(model="one", input=[result], previous_response_id=told.id, tools=[WEATHER])
    assert asked(stack)["messages"] == turns
    responses.create(model="one", input=[{"role": "user", "content": "call"}, *told.output, result], store=False)
    assert asked(stack)["messages"] == turns
    referred = [{"role": "user", "content": "call"}, {"type": "item_reference", "id": call.id}, result]
    responses.create(model="one", input=referred)
    assert asked(stack)["messages"] == turns

    events = list(responses.create(model="one", input="call", tools=[WEATHER], stream=True))
    kinds = [event.type for event in events]
    assert kinds[2:-1] == [
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * 2,
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert events[-3].arguments == '{"city": "Rome"}'
    only = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    responses.create(model="one", input="?", tools=[WEATHER, WEATHER | {"name": "time"}], tool_choice=only)
    assert [tool["function"]["name"] for tool in asked(stack)["tools"]] == ["weather"]
    assert asked(stack)["tool_choice"] == "auto"


def test_answers_of_a_schema(stack: Stack, responses):
    class Dog(BaseModel):
        name: str

    with pytest.raises(ValueError, match="Invalid JSON"):  # the words of the server's shape are no JSON
        responses.parse(model="one", input="?", text_format=Dog)
    asked_format = asked(stack)["response_format"]
    assert asked_format["type"] == "json_schema" and asked_format["json_schema"]["name"] == "Dog"
    assert asked_format["json_schema"]["schema"]["required"] == ["name"]


def test_an_answer_that_was_cut_off_says_so(responses):
    told = responses.create(model="one", input="long", max_output_tokens=16)
    assert told.status == "incomplete" and told.incomplete_details.reason == "max_output_tokens"
    assert told.output[0].status == "incomplete"
    events = list(responses.create(model="one", input="long", stream=True))
    assert events[-1].type == "response.incomplete"


def test_a_stream_that_breaks_off_fails(responses):
    *_, last = responses.create(model="one", input="break", stream=True)
    assert last.type == "response.failed" and "llm service" in last.response.error.message
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(last.response.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_request_along(stack: Stack, stream: bool):
    before = stack.llm.given_up
    body = {"model": "one", "input": "stall" if stream else "hang", "stream": stream}
    if stream:
        with (
            httpx.Client(trust_env=False, timeout=60) as client,
            client.stream("POST", stack.url + "/v1/responses", json=body) as response,
        ):
            assert next(response.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(stack.url + "/v1/responses", json=body, trust_env=False, timeout=2)
    wait_for(lambda: stack.llm.given_up == before + 1)


BAD: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "no input": ({}, 400, "input", "input"),
    "no items": ({"input": []}, 400, "input", "at least one"),
    "item a string": ({"input": ["a"]}, 400, "input[0]", "object"),
    "role": ({"input": [{"role": "tool", "content": "a"}]}, 400, "input[0].role", "user"),
    "no content": ({"input": [{"role": "user"}]}, 400, "input[0].content", "list of parts"),
    "web search": ({"input": "a", "tools": [{"type": "web_search"}]}, 400, "tools", "function"),
    "item type": ({"input": [{"type": "computer_call"}]}, 400, "input[0].type", "function_call"),
    "image twice": ({"input": shown("http://a/b", file_id="file-1")}, 400, "input[0].content[0]", "either"),
    "image an object": (
        {"input": shown({"url": "http://a"})},  # type: ignore[arg-type]
        400,
        "input[0].content[0]",
        "string",
    ),
    "detail": ({"input": shown("http://a", detail="lowest")}, 400, "input[0].content[0].detail", "auto"),
    "no such file": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]},
        404,
        "input[0].content[0].file_id",
        "upload it",
    ),
    "unreachable": ({"input": shown("http://127.0.0.1:1/a.png")}, 400, "input[0].content[0].image_url", "reached"),
    "kept image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image": "sha256:" + "0" * 64}]}]},
        400,
        "input[0].content[0]",
        "either",
    ),
    "chat's part": (
        {"input": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]},
        400,
        "input[0].content[0]",
        "input_image",
    ),
    "too many images": ({"input": shown(data_url(picture(1))) * 4}, 400, "input", "at most 3"),
    "no schema": ({"input": "a", "text": {"format": {"type": "json_schema", "name": "a"}}}, 400, None, "schema"),
    "previous": ({"input": "a", "previous_response_id": "resp_1"}, 400, "previous_response_id", "no response"),
    "reference": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 404, None, "no"),
    "background": ({"input": "a", "background": True}, 400, "background", "stream"),
    "conversation": ({"input": "a", "conversation": "conv_1"}, 400, "conversation", "previous_response_id"),
    "number a string": ({"input": "a", "temperature": "1"}, 400, "temperature", "number"),
    "too hot": ({"input": "a", "temperature": 3}, 400, "temperature", "2"),
    "unknown model": ({"model": "gpt-4", "input": "a"}, 404, "model", "there are: one, two"),
    "too long": ({"input": "too long"}, 400, "input_tokens", "maximum context length"),
    "engine dead": ({"input": "engine dead"}, 503, None, "llm service"),
}


@pytest.mark.parametrize(("body", "status", "param", "said"), BAD.values(), ids=BAD.keys())
def test_bad_requests_are_told_where_and_why(stack: Stack, body, status: int, param: str | None, said: str):
    response = httpx.post(stack.url + "/v1/responses", json={"model": "one"} | body, trust_env=False, timeout=120)
    assert response.status_code == status, response.text
    told = error(response)
    assert said in str(told["message"])
    if param:
        assert told["param"] == param


def test_other_urls(stack: Stack):
    for path in ("/v1/responses/resp_1", "/v1/responses/resp_1/input_items"):
        response = httpx.get(stack.url + path, trust_env=False, timeout=60)
        assert response.status_code == 404 and "resp_1" in str(error(response)["message"])
    told = httpx.post(stack.url + "/v1/responses", json={"model": "one", "input": "a"}, trust_env=False).json()
    assert httpx.get(f"{stack.url}/v1/responses/{told['id']}?stream=true", trust_env=False).status_code == 400
    bad = httpx.get(f"{stack.url}/v1/responses/{told['id']}/input_items?limit=0", trust_env=False)
    assert bad.status_code == 400 and error(bad)["param"] == "limit"
