"""What a chat's body may hold, and how a client is told what it may not."""

from typing import Any

import pytest

from basalt.api_errors import APIError
from services.gateway.schema import Source, check_chat

TOOL = {"type": "function", "function": {"name": "weather"}}
PNG = "data:image/png;base64,AAAA"


def body(*content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "one", "messages": [{"role": "user", "content": list(content) or "Hello"}], **fields}


def shown(**more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": PNG, **more}}


BAD = [
    ({"temperature": "1"}, "temperature", "number"),
    ({"temperature": 3}, "temperature", "equal to 2"),
    ({"temperature": True}, "temperature", "number"),
    ({"stop": ["a", 5]}, "stop[1]", "string"),
    ({"n": 0}, "n", "equal to 1"),
    ({"n": 17}, "n", "at most 16"),
    ({"top_logprobs": 21}, "top_logprobs", "20"),
    ({"logit_bias": {"cat": 1}}, "logit_bias.cat", "pattern"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "equal to 1"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "required",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    ({"tool_choice": "any"}, "tool_choice", "auto"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "boolean"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "one of"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "string"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].file", "file_id"),
]


@pytest.mark.parametrize(("fields", "param", "said"), BAD)
def test_what_is_wrong_is_told_with_its_place(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(APIError) as refused:
        check_chat(body() | fields, 8)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert said in refused.value.message


def test_nulls_and_what_is_not_known_are_let_through() -> None:
    known = ("temperature", "top_p", "n", "stop", "seed", "tools", "tool_choice", "response_format", "logit_bias")
    nulls = dict.fromkeys((*known, "stream", "stream_options", "max_tokens", "metadata", "user", "logprobs"))
    chat = check_chat(body(**nulls, top_k=5, something_new={"a": [None]}), 8)
    assert chat.body["top_k"] == 5 and chat.body["something_new"] == {"a": [None]}
    assert "tools" not in check_chat(body(tools=[], tool_choice="auto"), 8).body


def test_images_are_found_with_their_places() -> None:
    chat = check_chat(body({"type": "text", "text": "a"}, shown(), {"type": "file", "file": {"file_id": "file-1"}}), 8)
    assert [(image.source, image.param) for image in chat.images] == [
        (Source("url", PNG), "messages[0].content[1].image_url.url"),
        (Source("file", "file-1"), "messages[0].content[2].file.file_id"),
    ]


@pytest.mark.parametrize("url", [["kept", "sha256:" + "0" * 64], {"kept": "sha256:" + "0" * 64}, "kept"])
def test_no_client_names_what_is_kept(url: object) -> None:
    try:
        chat = check_chat(body({"type": "image_url", "image_url": url}), 8)
    except APIError as error:
        assert error.status == 400
    else:
        assert not [image for image in chat.images if image.source.kind == "kept"]


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"messages": body(shown(detail="low"))["messages"]}, ["detail"]),
        ({"messages": body(shown(detail="auto"))["messages"]}, []),
        ({"store": True}, ["store"]),
        ({"store": False}, []),
    ],
)
def test_what_makes_no_difference(fields: dict[str, Any], ignored: list[str]) -> None:
    assert check_chat(body() | fields, 8).ignored == ignored


def test_a_developer_is_the_system() -> None:
    chat = check_chat(body() | {"messages": [{"role": "developer", "content": "Be brief."}]}, 8)
    assert chat.body["messages"][0]["role"] == "system"


def test_a_choice_among_some_tools_is_those_alone() -> None:
    other = {"type": "function", "function": {"name": "time"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL]}}
    chat = check_chat(body(tools=[other, TOOL], tool_choice=choice), 8)
    assert chat.body["tools"] == [TOOL] and chat.body["tool_choice"] == "required"
    with pytest.raises(APIError, match="none of the 'tools'"):
        check_chat(body(tools=[other], tool_choice=choice), 8)
