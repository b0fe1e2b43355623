"""What is built on OpenAI's API works unchanged: LangChain itself, and requests of the shapes that others send."""

import base64
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from tests.gateway.conftest import Stack
from tests.gateway.llm_shaped import WORDS
from tests.gateway.test_chat import data_url
from tests.tiny import picture

SAID = "".join(WORDS)
PNG = data_url(picture(1))
SHOWN = {"type": "image_url", "image_url": {"url": PNG}}


class Dog(BaseModel):
    """A dog in a picture."""

    name: str


def langchain(stack: Stack, **options: Any):
    openai = pytest.importorskip("langchain_openai")
    return openai.ChatOpenAI(base_url=f"{stack.url}/v1", api_key="none", model="one", max_retries=0, **options)


def image_message() -> list[Any]:
    messages = pytest.importorskip("langchain_core.messages")
    image = {"type": "image", "base64": base64.b64encode(picture(1)).decode(), "mime_type": "image/png"}
    question = messages.HumanMessage(content_blocks=[{"type": "text", "text": "What is it?"}, image])
    return [messages.SystemMessage("Be brief."), question]


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_asks_and_streams(stack: Stack, responses: bool) -> None:
    model = langchain(stack, use_responses_api=responses, temperature=0, max_tokens=64)
    answer = model.invoke(image_message())
    sent = stack.llm.bodies[-1]
    assert answer.text == SAID
    assert answer.usage_metadata["input_tokens"] == 20 and answer.usage_metadata["output_tokens"] == 7
    assert [part["type"] for part in sent["messages"][1]["content"]] == ["text", "image_embeds"]
    assert sent["max_completion_tokens"] == 64
    chunks = list(model.stream(image_message(), **({} if responses else {"stream_usage": True})))
    assert "".join(chunk.text for chunk in chunks) == SAID
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 7


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_calls_tools(stack: Stack, responses: bool) -> None:
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"Sunny in {city}."

    model = langchain(stack, use_responses_api=responses).bind_tools([weather], tool_choice="weather")
    first = model.invoke("call")
    assert stack.llm.bodies[-1]["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Rome"})
    messages = pytest.importorskip("langchain_core.messages")
    result = messages.ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    assert model.invoke([messages.HumanMessage("call"), first, result]).text == SAID
    assert [message["role"] for message in stack.llm.bodies[-1]["messages"]] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_asks_for_structure(stack: Stack, method: str) -> None:
    model = langchain(stack).with_structured_output(Dog, method=method, include_raw=True)
    model.invoke("call")
    sent = stack.llm.bodies[-1]
    if method == "function_calling":
        assert sent["tools"][0]["function"]["name"] == "Dog"
    else:
        assert sent["response_format"]["type"] == method.replace("mode", "object")


# Open WebUI: the chat, with what it sends along; a title for it; images among older turns, empty answers, no usage.
OPEN_WEBUI = [
    {
        "stream": True,
        "model": "one",
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}, SHOWN]},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "And now?"},
        ],
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "top_k": 40,
        "min_p": 0.05,
        "stop": ["</s>"],
        "logit_bias": {},
        "user": "somebody",
    },
    {
        "model": "one",
        "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title"}],
        "stream": False,
        "max_completion_tokens": 1000,
    },
]
# LiteLLM's proxy: nulls for what was not set, fields of its own, an image's format, cache marks for other providers.
LITELLM = [
    {
        "model": "one",
        "messages": [
            {
                "role": "system",
                "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": PNG, "format": "image/png", "detail": None}},
                ],
            },
        ],
        "temperature": None,
        "n": None,
        "stop": None,
        "max_tokens": 256,
        "tools": None,
        "tool_choice": None,
        "response_format": None,
        "metadata": {"user_api_key": "hash", "tags": ["a"]},
        "litellm_call_id": "4ce5",
        "drop_params": True,
    },
    {
        "model": "one",
        "messages": [
            {"role": "user", "content": "Weather?", "name": "tom"},
            {
                "role": "assistant",
                "content": None,
                "function_call": None,
                "tool_calls": [
                    {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "Sunny."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "stream": True,
    },
]


@pytest.mark.parametrize("body", [*OPEN_WEBUI, *LITELLM])
def test_requests_of_other_clients(stack: Stack, body: dict[str, Any]) -> None:
    headers = {"Authorization": "Bearer sk-anything", "X-OpenWebUI-User-Name": "Tom", "HTTP-Referer": "http://x"}
    response = httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers=headers, trust_env=False, timeout=60)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert ('"choices": []' in response.text) == bool(body.get("stream_options"))
    else:
        assert response.json()["choices"][0]["message"]["content"] == SAID
    sent = stack.llm.bodies[-1]
    assert [message["role"] for message in sent["messages"]] == [message["role"] for message in body["messages"]]


def test_the_list_of_models_as_clients_read_it(stack: Stack) -> None:
    listed = httpx.get(f"{stack.url}/v1/models", trust_env=False).json()
    assert listed["object"] == "list"
    assert all({"id", "object", "created", "owned_by"} <= set(model) for model in listed["data"])
