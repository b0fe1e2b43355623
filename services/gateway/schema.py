"""The chat request as far as the gateway must understand it; the LLM service checks the rest."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, NoReturn

from pydantic import ValidationError

from basalt.api_errors import APIError, bad_request
from services.gateway.chat_body import DETAILS, MAX_CHOICES, ROLES, ChatBody

PART_TYPES = ("text", "image_url", "file", "refusal")
# vLLM takes these from whoever asks; they reach into the engine, or past the assistant.
NOT_FOR_CLIENTS = {
    *("kv_transfer_params", "ec_transfer_params", "mm_processor_kwargs", "media_io_kwargs", "vllm_xargs"),
    *("priority", "request_id", "use_beam_search", "chat_template"),
    *("prompt_logprobs", "return_token_ids", "return_prompt_text"),
}


class Source(NamedTuple):
    """Where an image is to be had: by URL, as a file that the caller uploaded, or (never by a client's own words) as
    what an earlier response kept, by its id, sha256:…"""

    kind: Literal["url", "file", "kept"]
    name: str


@dataclass(frozen=True)
class ImagePart:
    """Where a request shows an image: `messages[i].content[j]`."""

    source: Source
    param: str  # its place in the body, for error messages
    content: list[Any]
    index: int
    detail: str | None = None

    def replace(self, part: dict[str, Any]) -> None:
        self.content[self.index] = part


@dataclass(frozen=True)
class ChatRequest:
    """`body` is the client's, whole; replacing an image part changes it.

    Attributes:
        ignored: what was asked for and makes no difference here.
        taken: the ids, sha256:…, of its images, once they were taken.
    """

    body: dict[str, Any]
    model: str
    images: list[ImagePart]
    ignored: list[str] = field(default_factory=list)
    taken: dict[Source, str] = field(default_factory=dict)

    def for_version(self, version: str) -> "ChatRequest":
        """The same request to one version, NAME@HEX, of the assistant it names."""
        self.body["model"] = version
        return replace(self, model=version)

    @property
    def wants_usage(self) -> bool:
        """Whether the usage of a stream is for the client too."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    def encode(self) -> bytes:
        """For the LLM service: a stream tells its usage always."""
        options = self.body.get("stream_options") or {}
        if self.body.get("stream") is True and isinstance(options, dict):
            return self._written(self.body | {"stream_options": options | {"include_usage": True}})
        return self._written(self.body)

    @staticmethod
    def _written(body: dict[str, Any]) -> bytes:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def parse_chat(raw: bytes, max_images: int) -> ChatRequest:
    """Reads and checks a chat request.

    Raises:
        APIError: (400) what is wrong, where, and what would be right.
    """
    return check_chat(parse_json(raw, "'model' and 'messages'"), max_images)


def check_chat(body: dict[str, Any], max_images: int) -> ChatRequest:
    """
    Raises:
        APIError: (400).
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("'model' must be the name of an assistant; GET /v1/models lists them", "model")
    for key in body:
        if key.endswith("_embeds"):
            raise bad_request(f"'{key}' is not accepted: send images as image_url parts", key, "unsupported_value")
        if key in NOT_FOR_CLIENTS:
            raise bad_request(f"'{key}' is not accepted: leave it out", key, "unsupported_value")
    if isinstance(n := body.get("n"), int) and n > MAX_CHOICES:
        raise bad_request(f"'n' is at most {MAX_CHOICES}, not {n}", "n")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("'messages' must be a list of at least one message", "messages")
    images = [image for index, message in enumerate(messages) for image in _images(message, f"messages[{index}]")]
    if len(images) > max_images:
        raise bad_request(
            f"the request has {len(images)} images, at most {max_images} are allowed in all its messages together",
            "messages",
            "too_many_images",
        )
    try:
        ChatBody.model_validate(body)
    except ValidationError as error:
        raise told(error, body) from None
    for message in messages:
        if message["role"] == "developer":  # OpenAI's newer word; chat templates know the older
            message["role"] = "system"
    _settle_tools(body)
    return ChatRequest(body, model, images, _ignored(body, images))


def _settle_tools(body: dict[str, Any]) -> None:
    """As vLLM takes them: no tools are none at all, and a choice among some of them is those alone."""
    choice = body.get("tool_choice")
    if not body.get("tools") and choice in (None, "auto", "none"):
        body.pop("tools", None)
        body.pop("tool_choice", None)
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        allowed = {tool["function"]["name"] for tool in choice["allowed_tools"]["tools"]}
        body["tools"] = [tool for tool in body.get("tools") or () if tool["function"]["name"] in allowed]
        body["tool_choice"] = choice["allowed_tools"]["mode"]
        if not body["tools"]:
            raise bad_request("'tool_choice' allows none of the 'tools'", "tool_choice")


def told(error: ValidationError, body: Any) -> APIError:
    """What is wrong with a body, as a client is told: of all that the validator tried, what came furthest."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    places = [_place(each["loc"], body, missing=each["type"] == "missing") for each in found]
    place = max(places, key=len)
    message = found[places.index(place)]["msg"]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".")
    return bad_request(f"'{param}': {message[0].lower()}{message[1:]}", param)


def _place(steps: Sequence[int | str], body: Any, *, missing: bool) -> list[int | str]:
    """Of a validator's steps those that lead into the body. Others name what it tried of a union."""
    place: list[int | str] = []
    for step in steps:
        inside = step in body if isinstance(body, dict) else isinstance(body, list) and isinstance(step, int)
        if inside:
            place.append(step)
            body = body[step]  # pyright: ignore[reportArgumentType, reportCallIssue] (a validator's steps fit)
    return [*place, steps[-1]] if missing else place


def _ignored(body: dict[str, Any], images: list[ImagePart]) -> list[str]:
    """A tower has one resolution, and chats are not kept."""
    ignored = ["detail"] if any(image.detail in ("low", "high") for image in images) else []
    return ignored + [name for name in ("store",) if body.get(name)]


def parse_json(raw: bytes, wanted: str) -> dict[str, Any]:
    """A body that can be written again as JSON.

    Args:
        wanted: what it must hold, for the message.

    Raises:
        APIError: (400).
    """
    try:
        body = json.loads(raw, parse_constant=_no_constant)
        # What UTF-8 cannot hold cannot be sent on; what is nested too deeply to be written neither.
        json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="invalid_json") from None
    except UnicodeEncodeError:
        raise bad_request(
            "the body holds half of a surrogate pair (\\ud800 to \\udfff alone)", code="invalid_json"
        ) from None
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise bad_request(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", code="invalid_json"
        ) from None
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request(f"the body must be a JSON object with {wanted}", code="invalid_json")
    return body


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _images(message: Any, where: str) -> list[ImagePart]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise bad_request(f"'{where}' must be an object with 'role' and 'content'", where)
    if message["role"] not in ROLES:
        raise bad_request(f"'{where}.role' is one of {', '.join(ROLES)}", f"{where}.role")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return []
    if not isinstance(content, list):
        raise bad_request(f"'{where}.content' must be a string or a list of parts", f"{where}.content")
    parts = [_image(content, index, f"{where}.content[{index}]") for index in range(len(content))]
    return [part for part in parts if part is not None]


def _image(content: list[Any], index: int, where: str) -> ImagePart | None:
    part = content[index]
    if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
        kind = part.get("type") if isinstance(part, dict) else part
        raise bad_request(
            f"'{where}' must be a text or image_url part; {str(kind)[:40]!r} is not accepted",
            where,
            "unsupported_value",
        )
    if part["type"] in ("text", "refusal") and not isinstance(part.get(part["type"]), str):
        raise bad_request(f"'{where}.{part['type']}' must be a string", f"{where}.{part['type']}")
    if part["type"] == "file":
        return ImagePart(_file(part, where), f"{where}.file.file_id", content, index)
    if part["type"] != "image_url":
        return None
    image_url = part.get("image_url")
    if isinstance(image_url, Source):  # not a client's: JSON holds no such thing
        return ImagePart(image_url, f"{where}.image_url", content, index)
    url = image_url.get("url") if isinstance(image_url, dict) else None
    if not isinstance(image_url, dict) or not isinstance(url, str) or not url:
        raise bad_request(
            f"'{where}.image_url' must be an object {{\"url\": …}} with an http(s) or data: URL", f"{where}.image_url"
        )
    detail = image_url.get("detail")
    if detail is not None and detail not in DETAILS:
        raise bad_request(f"'{where}.image_url.detail' is one of {', '.join(DETAILS)}", f"{where}.image_url.detail")
    return ImagePart(Source("url", url), f"{where}.image_url.url", content, index, detail)


def _file(part: dict[str, Any], where: str) -> Source:
    file = part.get("file")
    file_id = file.get("file_id") if isinstance(file, dict) else None
    if not isinstance(file_id, str) or not file_id:
        raise bad_request(
            f"'{where}.file' must be an object {{\"file_id\": …}} of an image uploaded to /v1/files; "
            "send other images as image_url parts",
            f"{where}.file",
        )
    return Source("file", file_id)
