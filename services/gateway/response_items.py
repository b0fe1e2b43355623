"""The items of OpenAI's responses: read from a request, kept, turned into chat messages, shown again.

An item is a dict of OpenAI's shape with only the fields named here. Beside OpenAI's an `input_image` may have one more,
`image`: the id, sha256:…, of what the gateway keeps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from basalt.api_errors import APIError, bad_request
from services.gateway.chat_body import DETAILS
from services.gateway.schema import Source

Item = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "refusal")
PREVIOUS = "previous_response_id"
SHORTER = {".image_url.url": ".image_url", ".file.file_id": ".file_id"}  # than the names in a chat
ITEMS = "message, function_call, function_call_output, item_reference"


def read_items(given: str | list[Any]) -> list[Item]:
    """The `input` of a request. What a reasoning model thought is of no use to another and is left out.

    Raises:
        APIError: (400) what is wrong, where, and what would be right.
    """
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    if not given:
        raise bad_request("'input' must be a string or a list of at least one item", "input")
    items = [_item(each, f"input[{index}]") for index, each in enumerate(given)]
    return [item for item in items if item["type"] != "reasoning"]


def _item(given: Any, where: str) -> Item:
    if not isinstance(given, dict):
        raise bad_request(f"'{where}' must be an object: an item of type {ITEMS}", where)
    match given.get("type", "message"):
        case "message":
            role = given.get("role")
            if role not in ROLES:
                raise bad_request(f"'{where}.role' is one of {', '.join(ROLES)}", f"{where}.role")
            content = _content(given.get("content"), f"{where}.content", said=role == "assistant")
            return {"type": "message", "role": role, "content": content}
        case "function_call":
            return {"type": "function_call"} | {
                name: _text(given, name, where) for name in ("call_id", "name", "arguments")
            }
        case "function_call_output":
            output = given.get("output")
            read = output if isinstance(output, str) else _content(output, f"{where}.output")
            return {"type": "function_call_output", "call_id": _text(given, "call_id", where), "output": read}
        case "item_reference":
            return {"type": "item_reference", "id": _text(given, "id", where)}
        case "reasoning":
            return {"type": "reasoning"}
        case kind:
            raise bad_request(
                f"'{where}' is of type {str(kind)[:40]!r}; taken are {ITEMS}", f"{where}.type", "unsupported_value"
            )


def _text(given: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(given.get(name), str):
        raise bad_request(f"'{where}.{name}' must be a string", f"{where}.{name}")
    return given[name]


def _content(given: Any, where: str, *, said: bool = False) -> list[Item]:
    """
    Args:
        said: by the assistant, who shows no images.
    """
    if isinstance(given, str):
        return [{"type": "output_text" if said else "input_text", "text": given}]
    if not isinstance(given, list):
        raise bad_request(f"'{where}' must be a string or a list of parts", where)
    return [_part(each, f"{where}[{index}]", said) for index, each in enumerate(given)]


def _part(given: Any, where: str, said: bool) -> Item:
    kind = given.get("type") if isinstance(given, dict) else given
    if kind in TEXTS:
        name = "refusal" if kind == "refusal" else "text"
        return {"type": "output_text" if said else "input_text", "text": _text(given, name, where)}
    if kind not in ("input_image", "input_file") or said:
        wanted = "output_text" if said else "input_text or input_image"
        raise bad_request(
            f"'{where}' must be an {wanted} part; {str(kind)[:40]!r} is not accepted", where, "unsupported_value"
        )
    places = {name: given.get(name) for name in ("image_url", "file_id") if given.get(name) is not None}
    if len(places) != 1 or not all(isinstance(place, str) and place for place in places.values()):
        raise bad_request(
            f"'{where}' must have either 'image_url', a string with an http(s) or data: URL, "
            "or the 'file_id' of an image uploaded to /v1/files",
            where,
        )
    detail = given.get("detail") or "auto"
    if detail not in DETAILS:
        raise bad_request(f"'{where}.detail' is one of {', '.join(DETAILS)}", f"{where}.detail")
    return {"type": "input_image", "detail": detail, **places}


@dataclass
class Chat:
    """Items as the messages of a chat, and where in the request what stands in them stood."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, items: list[Item], where: str | None) -> None:
        """
        Args:
            where: `input`, of a request; nothing, of items that are kept.
        """
        for index, item in enumerate(items):
            place = where and f"{where}[{index}]"
            match item["type"]:
                case "message":
                    self._say(item["role"], item["content"], f"{place}.content" if place else None)
                case "function_call":
                    self._call(item)
                case "function_call_output":
                    self._say("tool", item["output"], f"{place}.output" if place else None)
                    self.messages[-1]["tool_call_id"] = item["call_id"]

    def told(self, error: APIError) -> APIError:
        """An error of the chat, as one of the request that it was made from."""
        param = error.param or ""
        found = next((place for place in self.places if param.startswith(place)), None)
        if found and self.places[found] == PREVIOUS:
            error.param = PREVIOUS
        elif found:
            end = param.removeprefix(found)
            error.param = self.places[found] + SHORTER.get(end, end)
        elif param.startswith("messages"):
            error.param = "input"
        if param and error.param != param:
            error.message = error.message.replace(param, str(error.param))
        return error

    def _say(self, role: str, content: str | list[Item], where: str | None) -> None:
        message = f"messages[{len(self.messages)}]"
        if isinstance(content, str):
            parts: Any = content
        elif all(part["type"] != "input_image" for part in content) and (role == "assistant" or len(content) == 1):
            parts = "".join(part["text"] for part in content)
        else:
            parts = [_chat_part(part) for part in content]
            self.places |= {
                f"{message}.content[{index}]": f"{where}[{index}]" if where else PREVIOUS for index in range(len(parts))
            }
        self.messages.append({"role": role, "content": parts})

    def _call(self, item: Item) -> None:
        """Of the message before it, if that is the assistant's: they were one answer."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        self.messages[-1].setdefault("tool_calls", []).append(call)


def _chat_part(part: Item) -> dict[str, Any]:
    if part["type"] != "input_image":
        return {"type": "text", "text": part["text"]}
    if "image" in part:
        return {"type": "image_url", "image_url": Source("kept", part["image"])}
    if "file_id" in part:
        return {"type": "file", "file": {"file_id": part["file_id"]}}
    return {"type": "image_url", "image_url": {"url": part["image_url"], "detail": part["detail"]}}


def said(output: list[Item]) -> list[Item]:
    """Output items as they stand in an input."""
    return read_items(output) if output else []


def images_of(items: list[Item]) -> list[Item]:
    """The `input_image` parts."""
    contents = [item.get("content") or item.get("output") for item in items]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if part["type"] == "input_image"]


def source_of(part: Item) -> Source:
    if "image" in part:
        return Source("kept", part["image"])
    return Source("file", part["file_id"]) if "file_id" in part else Source("url", part["image_url"])


def kept(items: list[Item], taken: Mapping[Source, str]) -> list[Item]:
    """The items for the record: images by their ids, not their bytes.

    Args:
        taken: the ids of images.
    """
    for part in images_of(items):
        part["image"] = taken[source_of(part)]
        if part.get("image_url", "").startswith("data:"):
            del part["image_url"]
    return items


def item_id(kind: str, response_id: str, index: int) -> str:
    """The id of an item of a response, inputs counted before outputs: by it the response is found again."""
    prefix = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}[kind]
    return f"{prefix}_{response_id.removeprefix('resp_')}{index:04x}"


def place_of(id_of_item: str) -> tuple[str, int]:
    """The response that an item is of, and which of its items it is.

    Raises:
        APIError: (404) no item is called so.
    """
    name = id_of_item.partition("_")[2]
    try:
        return f"resp_{name[:-4]}", int(name[-4:], 16)
    except ValueError:
        raise bad_request(f"there is no item {id_of_item[:100]!r}", "input", "not_found", 404) from None
