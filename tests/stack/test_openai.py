"""What OpenAI's vision chat takes, asked with OpenAI's own client of the real services."""

import json
import math
import re
import threading
import time
from collections.abc import Callable
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.gateway.test_clients import LITELLM, OPEN_WEBUI

from .conftest import Stack
from .test_stack import MODEL, data_url, picture, question, shape, sign

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Invent a name for a ship, and tell its story."}]
LONG = 4000  # tokens
ENDLESS = {"0": -100, "2": -100}  # SmolLM2's two tokens that end an answer
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def ask(stack: Stack) -> Callable[..., openai.types.chat.ChatCompletion]:
    def create(messages: list | None = None, **options):
        options = {"model": MODEL, "temperature": 0, "max_completion_tokens": 16} | options
        return stack.client().chat.completions.create(messages=messages or CAPITAL, **options)

    return create


def test_images_anywhere_in_the_content_and_their_detail(ask) -> None:
    red, stop = data_url(shape("red")), data_url(sign())
    detailed = {"type": "image_url", "image_url": {"url": stop, "detail": "low"}}
    apart = [question("First:", picture(red), "Second:", detailed, "What is in them?")]
    answer = ask(apart)
    assert answer.choices[0].message.content
    words_alone = ask([question("First:", "Second:", "What is in them?")])
    assert answer.usage.prompt_tokens > words_alone.usage.prompt_tokens + 100  # two images' tokens
    earlier = [question(picture(red), "And this?"), {"role": "assistant", "content": "A circle."}]
    assert ask([{"role": "system", "content": "Be brief."}, *earlier, question(detailed, "And this?")])
    for detail in ("auto", "high"):
        assert ask([question({"type": "image_url", "image_url": {"url": red, "detail": detail}}, "?")])
    with pytest.raises(openai.BadRequestError, match="detail"):
        ask([question({"type": "image_url", "image_url": {"url": red, "detail": "lowest"}}, "?")])


def test_limits_of_length_and_stop(ask) -> None:
    short = ask(max_completion_tokens=3)
    assert short.usage.completion_tokens == 3 and short.choices[0].finish_reason == "length"
    stopped = ask(stop=["Par"])
    assert stopped.choices[0].finish_reason == "stop"
    assert "Par" not in stopped.choices[0].message.content


def test_several_choices_and_seeds(ask) -> None:
    def said(**options) -> list[str]:
        return [
            c.message.content
            for c in ask(STORY, temperature=1.2, top_p=0.95, max_completion_tokens=12, **options).choices
        ]

    first = said(n=3, seed=7)
    assert len(first) == 3 and len(set(first)) > 1
    assert said(n=3, seed=7) == first
    assert said(n=3, seed=8) != first
    with pytest.raises(openai.BadRequestError, match="'n'"):
        ask(n=10_000)


def test_log_probabilities(ask) -> None:
    choice = ask([question(picture(data_url(sign())), "What does it say?")], logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).startswith(choice.message.content)
    for token in tokens:
        assert len(token.top_logprobs) >= 3
        assert math.isclose(token.logprob, max(top.logprob for top in token.top_logprobs), abs_tol=1e-3)  # greedy


def test_answers_of_a_schema(ask) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["red", "green"]}, "round": {"type": "boolean"}},
        "required": ["colour", "round"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema, "strict": True}}
    asked = [question(picture(data_url(shape("red"))), "What colour is the circle?")]
    answer = json.loads(ask(asked, response_format=wanted, max_completion_tokens=48).choices[0].message.content)
    assert answer["colour"] in ("red", "green") and isinstance(answer["round"], bool)
    with pytest.raises(openai.BadRequestError):
        ask(asked, response_format={"type": "json_schema"})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_tools(ask, choice: object, stream: bool) -> None:
    asked = [{"role": "user", "content": "What will the weather in Rome be for 3 days?"}]
    options = {"tools": [WEATHER], "tool_choice": choice, "max_completion_tokens": 64}
    if stream:
        deltas = [chunk.choices[0].delta for chunk in ask(asked, stream=True, **options) if chunk.choices]
        calls = [call.function for delta in deltas for call in delta.tool_calls or []]
        name = next(call.name for call in calls if call.name)
        arguments = "".join(call.arguments or "" for call in calls)
    else:
        call = ask(asked, **options).choices[0].message.tool_calls[0]
        name, arguments = call.function.name, call.function.arguments
    assert name == "weather"
    read = json.loads(arguments)
    assert read["city"] in ("Paris", "Rome") and isinstance(read["days"], int)


def test_the_answer_of_a_tool_goes_on(ask) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    assert ask(turns, tools=[WEATHER], tool_choice="none").choices[0].message.content


def test_usage_of_a_stream_is_told_where_it_is_asked_for(ask) -> None:
    whole = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert not chunks[-1].choices
    plain = list(ask(stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)
    assert "".join(c.choices[0].delta.content or "" for c in plain) == whole.choices[0].message.content
    finished = [c.choices[0].finish_reason for c in plain if c.choices[0].finish_reason]
    assert len(finished) == 1 and plain[0].choices[0].delta.role == "assistant"


def test_who_asks_and_what_for_is_taken(ask) -> None:
    assert ask(user="somebody", metadata={"purpose": "test"}, store=False).choices[0].message.content
    assert ask(parallel_tool_calls=False, tools=[WEATHER], tool_choice="none").choices[0].message.content
    assert ask(logit_bias={"50": -100}, presence_penalty=0.1, frequency_penalty=0.1).choices[0].message.content


def test_request_ids(stack: Stack, ask) -> None:
    own = ask(extra_headers={"X-Request-Id": "my-request-7"})
    assert own._request_id == "my-request-7"
    assert own.id.startswith("chatcmpl-my-request-7")
    again = ask(extra_headers={"X-Request-Id": "my-request-7"})
    assert again.id != own.id
    assert re.fullmatch(r"req_[0-9a-f]{32}", ask()._request_id)


def test_what_reaches_into_the_engine_is_refused(ask) -> None:
    for field in ("kv_transfer_params", "chat_template", "priority", "use_beam_search", "prompt_embeds"):
        with pytest.raises(openai.BadRequestError, match=field):
            ask(extra_body={field: "1"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat/completions", "responses"])
def test_a_client_that_goes_stops_the_generation(stack: Stack, route: str, stream: bool) -> None:
    before = generated(stack)
    asked = {"input": "Tell a story."} if route == "responses" else {"messages": STORY}
    body = {"model": MODEL, "logit_bias": ENDLESS, "stream": stream, **asked}
    body |= {"max_output_tokens" if route == "responses" else "max_tokens": LONG}
    url = f"{stack.gateway}/v1/{route}"
    if stream:
        with httpx.stream("POST", url, json=body, trust_env=False, timeout=60) as response:
            pieces = response.iter_bytes()  # the connection is closed with it
            assert next(pieces)
            wait_for(lambda: running(stack) == 1)
    else:
        asking = threading.Thread(target=give_up, args=(url, body))
        asking.start()
        wait_for(lambda: running(stack) == 1)
        asking.join()
    wait_for(lambda: running(stack) == 0, 5)
    stopped = generated(stack)
    assert before < stopped < before + LONG / 2
    time.sleep(1)
    assert generated(stack) == stopped


def give_up(url: str, body: dict) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, trust_env=False, timeout=3)


def running(stack: Stack) -> float:
    """Requests in vLLM's engine, waiting ones too."""
    return metric(stack, "vllm:num_requests_running") + metric(stack, "vllm:num_requests_waiting")


def generated(stack: Stack) -> float:
    """Tokens, so far."""
    return metric(stack, "vllm:generation_tokens_total")


def metric(stack: Stack, pattern: str) -> float:
    text = httpx.get(f"{stack.llm}/metrics", trust_env=False, timeout=30).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(pattern + r"[{,} ]", line))


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_the_gateway_counts_what_the_llm_used(stack: Stack, ask) -> None:
    def counted(kind: str) -> float:
        text = httpx.get(f"{stack.gateway}/metrics", trust_env=False).text
        line = re.search(rf'basalt_gateway_tokens_total{{assistant="{MODEL}",kind="{kind}"}} (\S+)', text)
        return float(line[1]) if line else 0

    before = counted("prompt"), counted("completion")
    usage = ask().usage
    streamed = [chunk for chunk in ask(stream=True) if chunk.choices]
    assert streamed
    wait_for(lambda: counted("completion") == before[1] + 2 * usage.completion_tokens, 10)
    assert counted("prompt") == before[0] + 2 * usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_may_be_called(ask, stream: bool) -> None:
    asked = [{"role": "user", "content": "What will the weather in Rome be for 3 days?"}]
    options = {"tools": [WEATHER], "max_completion_tokens": 64}
    if stream:
        choices = [chunk.choices[0] for chunk in ask(asked, stream=True, **options) if chunk.choices]
        assert choices[-1].finish_reason in ("stop", "length", "tool_calls")
    else:
        message = ask(asked, **options).choices[0].message
        assert message.content or message.tool_calls
    unknown = {"type": "function", "function": {"name": "time"}}
    with pytest.raises(openai.BadRequestError, match="tool"):
        ask(asked, tools=[WEATHER], tool_choice=unknown)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert ask(asked, tools=[WEATHER], tool_choice=choice, max_completion_tokens=64).choices[0].message.tool_calls


def test_what_makes_no_difference_is_told(stack: Stack) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(shape("red")), "detail": "low"}}
    create = stack.client().chat.completions.with_raw_response.create
    raw = create(model=MODEL, messages=[question(image, "?")], store=True, max_completion_tokens=2)  # type: ignore[arg-type]
    assert raw.headers["X-Basalt-Ignored"] == "detail, store"


def response_input(*parts: str | dict) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "input_text", "text": p} if isinstance(p, str) else p for p in parts]}
    ]


def test_responses_answer_as_chats(stack: Stack, ask) -> None:
    client, image = stack.client(), shape("red")
    chat = ask([question(picture(data_url(image)), "What colour is it?")])
    file = client.files.create(file=("red.png", image), purpose="vision")
    for shown in ({"image_url": data_url(image)}, {"file_id": file.id}):
        told = client.responses.create(
            model=MODEL,
            input=response_input({"type": "input_image", "detail": "auto"} | shown, "What colour is it?"),  # type: ignore[arg-type]
            temperature=0,
            max_output_tokens=16,
        )
        assert told.output_text == chat.choices[0].message.content
        assert told.usage.input_tokens == chat.usage.prompt_tokens
        assert told.usage.output_tokens == chat.usage.completion_tokens
    assert told.usage.input_tokens_details.cached_tokens > 0
    by_id = question({"type": "file", "file": {"file_id": file.id}}, "What colour is it?")
    assert ask([by_id]).choices[0].message.content == chat.choices[0].message.content
    assert client.files.content(file.id).read() == image
    client.files.delete(file.id)


def test_a_response_goes_on_and_its_second_turn_is_cached(stack: Stack) -> None:
    client = stack.client()
    image = {"type": "input_image", "image_url": data_url(sign("STOP")), "detail": "auto"}
    options = {"model": MODEL, "temperature": 0, "max_output_tokens": 40}
    first = client.responses.create(input=response_input(image, "Describe the picture."), **options)  # type: ignore[call-overload]
    with client.responses.stream(input="What does it say?", previous_response_id=first.id, **options) as stream:  # type: ignore[call-overload]
        said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        second = stream.get_final_response()
    assert said == second.output_text and said
    before = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens > before
    block = 32
    assert second.usage.input_tokens_details.cached_tokens >= 0.95 * (before // block) * block
    assert client.responses.retrieve(second.id).output_text == said
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant", "user"]
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError):
        client.responses.create(input="And?", previous_response_id=second.id, **options)  # type: ignore[call-overload]


class Shape(BaseModel):
    colour: Literal["red", "green"]
    round: bool


def test_responses_of_a_schema_and_with_tools(stack: Stack) -> None:
    client = stack.client()
    image = {"type": "input_image", "image_url": data_url(shape("red")), "detail": "auto"}
    parsed = client.responses.parse(
        model=MODEL,
        input=response_input(image, "What colour is the circle?"),  # type: ignore[arg-type]
        text_format=Shape,
        max_output_tokens=48,
    )
    assert isinstance(parsed.output_parsed, Shape)
    tool = {"type": "function"} | WEATHER["function"]
    asked = {"model": MODEL, "tools": [tool], "tool_choice": "required", "max_output_tokens": 64}
    call = client.responses.create(input="What will the weather in Rome be for 3 days?", **asked).output[-1]  # type: ignore[call-overload]
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
    *_, last = client.responses.create(input="The weather in Paris, 2 days?", stream=True, **asked)  # type: ignore[call-overload]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output[-1].type == "function_call"


@pytest.mark.parametrize("body", [*OPEN_WEBUI, *LITELLM])
def test_requests_of_other_clients(stack: Stack, body: dict) -> None:
    asked = body | {"model": MODEL, "max_tokens": 8}
    response = httpx.post(f"{stack.gateway}/v1/chat/completions", json=asked, trust_env=False, timeout=120)
    assert response.status_code == 200, response.text
    assert "error" not in response.text
