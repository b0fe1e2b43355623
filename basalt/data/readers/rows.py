"""Rows, and the records that become rows: conversations, messages, texts, captions, questions with an answer.

Whatever file a record stands in, it comes here as the dictionary that its owner wrote. A record that cannot be
learned from becomes an `Unusable` with the reason, and never stops the reading of others.
"""

import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PLACEHOLDER = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
FORMS = ("conversations", "messages", "texts", "captions", "caption", "question")
FIELDS = (*FORMS, "answer", "image", "images", "tools", "functions")  # all that is read of a record

# How the name of an image begins that is inside the files of the rows: no file of a folder is called so.
INSIDE = "//"

NOT_JSON = "not JSON"
MISMATCH = f"images and {PLACEHOLDER} placeholders do not match"
MALFORMED = "a turn is malformed"
NOTHING_TO_LEARN = "no answer to learn"


class DataError(ValueError):
    """A data file is not what it says. The message names file and row, and what would be right."""


@dataclass(frozen=True)
class Row:
    """One conversation, about the images of its data set that `images` names in the order they are shown.

    `messages` are chat messages; a user's content may be a list of `{"type": "image"}` and
    `{"type": "text", "text": …}` parts, in order. An assistant's message with `"weight": 0` is read, not learned.
    """

    images: tuple[str, ...]
    messages: list[dict[str, Any]] = field(hash=False)
    where: str = field(default="", compare=False)  # in its file: "row 7", "line 8", "shard-3.tar, 000123"


@dataclass(frozen=True)
class Unusable:
    """A record that gives no row."""

    where: str
    reason: str  # one of few: they are counted by it
    found: str  # what this one has


@dataclass(frozen=True)
class Record:
    """One record as it stands in its file, but for images inside it: their names stand in their place."""

    where: str
    fields: Any


class _Refused(Exception):
    def __init__(self, reason: str, found: str) -> None:
        self.reason = reason
        self.found = found


class _Picture(NamedTuple):
    name: str | None  # None: the next of those that the record names


class _Turn(NamedTuple):
    role: str
    pieces: list[str | _Picture]
    weight: int = 1


def is_inside(name: str) -> bool:
    """Whether an image of this name is inside the files of the rows."""
    return name.startswith(INSIDE)


def rows_of(record: Record, prompt: str) -> Iterator[Row | Unusable]:
    """The rows of one record: several where it has several captions, each of them answering `prompt`."""
    try:
        names = _names(record.fields)
        yield from [_row(turns, names, record.where) for turns in _conversations(record.fields, names, prompt)]
    except _Refused as refused:
        yield Unusable(record.where, refused.reason, refused.found)


def _names(fields: Any) -> list[str]:
    """The images that a record names beside its turns."""
    if not isinstance(fields, dict):
        raise _Refused("not an object", type(fields).__name__)
    named = fields.get("image") or fields.get("images") or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Refused("'image' is neither a name nor a list of names", reprlib.repr(named))
    return names


def _conversations(fields: dict[str, Any], names: list[str], prompt: str) -> list[list[_Turn]]:
    form = next((form for form in FORMS if fields.get(form) is not None), None)
    if form is None:
        known = ", ".join(FORMS)
        raise _Refused(f"has none of {known}", f"it has {reprlib.repr(sorted(fields))}")
    if form == "conversations":
        return [[_llava_turn(turn) for turn in _listed(fields[form])]]
    if form == "messages":
        if fields.get("tools") or fields.get("functions"):
            raise _Refused("tool calls cannot be trained", "the record has tools")
        return [[_openai_turn(message) for message in _listed(fields[form])]]
    if form == "texts":
        return [
            [turn for number, text in enumerate(_listed(fields[form])) for turn in _text_turns(text, names, number)]
        ]
    if not names:
        raise _Refused("a caption or question without an 'image'", reprlib.repr(fields[form]))
    if form == "question":
        return [_exchange(fields["question"], fields.get("answer"), names)]
    captions = [fields[form]] if isinstance(fields[form], str) else _listed(fields[form])
    written = [_sentence(caption) for caption in captions if caption != ""]
    if not written:
        raise _Refused(NOTHING_TO_LEARN, "it has no caption")
    return [_exchange(prompt, caption, names) for caption in written]


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Refused(MALFORMED, f"a list is expected, found {reprlib.repr(value)}")
    return value


def _llava_turn(turn: Any) -> _Turn:
    """`{"from": "human" or "gpt", "value": …}`, with `<image>` anywhere in a human's."""
    speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if not isinstance(speaker, str) or speaker not in ROLES or not isinstance(value, str):
        raise _Refused(
            MALFORMED, f"'from' (human or gpt) and a 'value' of text are expected, found {reprlib.repr(turn)}"
        )
    return _Turn(ROLES[speaker], _cut(value))


def _openai_turn(message: Any) -> _Turn:
    """`{"role", "content"}`, the content a text or a list of parts; an assistant's may have `weight` 0 or 1."""
    role = message.get("role") if isinstance(message, dict) else None
    if isinstance(message, dict) and (
        role in ("tool", "function") or message.get("tool_calls") or message.get("function_call")
    ):
        raise _Refused("tool calls cannot be trained", reprlib.repr(message))
    if not isinstance(role, str) or role not in ROLES:
        raise _Refused(
            MALFORMED, f"a 'role' (user or assistant) and 'content' are expected, found {reprlib.repr(message)}"
        )
    weight = 1 if message.get("weight") is None else message["weight"]
    if weight not in (0, 1):
        raise _Refused("'weight' is neither 0 nor 1", reprlib.repr(weight))
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else _listed(content)
    return _Turn(ROLES[role], [piece for part in parts for piece in _part(part)], int(weight))


def _part(part: Any) -> list[str | _Picture]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _cut(part["text"])
    if kind == "image":
        return [_Picture(None)]
    if kind != "image_url":
        raise _Refused("a part is neither text nor image_url", reprlib.repr(part))
    holder = part.get("image_url")
    url = holder.get("url") if isinstance(holder, dict) else holder
    if not isinstance(url, str):
        raise _Refused(MALFORMED, f"an image_url needs a 'url', found {reprlib.repr(part)}")
    if url.startswith(("http://", "https://")):
        raise _Refused("an image is at a web address: give it as a data: URL or a file", reprlib.repr(url))
    if url.startswith("data:"):
        raise _Refused("an image is a data: URL, which only .jsonl may hold", reprlib.repr(url))
    return [_Picture(url)]


def _text_turns(text: Any, names: list[str], number: int) -> list[_Turn]:
    """`{"user", "assistant"}` of the_cauldron; its images come before the first question."""
    if not isinstance(text, dict):
        raise _Refused(MALFORMED, f"'user' and 'assistant' are expected, found {reprlib.repr(text)}")
    return _exchange(text.get("user"), text.get("assistant"), [] if number else names)


def _exchange(question: Any, answer: Any, names: list[str]) -> list[_Turn]:
    """A question, its images before it unless it says itself where they are, and the answer."""
    if not isinstance(question, str) or not isinstance(answer, str | int | float):
        raise _Refused(MALFORMED, f"a question and an answer are expected, found {reprlib.repr((question, answer))}")
    before = [] if PLACEHOLDER in question else [_Picture(None)] * len(names)
    return [_Turn("user", [*before, *_cut(question)]), _Turn("assistant", _cut(str(answer)))]


def _sentence(caption: Any) -> str:
    """Captions of the classic sets come tokenised (`"a dog runs ."`): written as people write."""
    if not isinstance(caption, str):
        raise _Refused(MALFORMED, f"a caption is expected, found {reprlib.repr(caption)}")
    text = re.sub(r"\s+([.,;:!?])", r"\1", caption.strip())
    return text[:1].upper() + text[1:]


def _cut(text: str) -> list[str | _Picture]:
    """`"<image>\\nWhat?"` → a picture and a text, in order."""
    pieces: list[str | _Picture] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        pieces += [_Picture(None), piece] if number else [piece]
    return pieces


def _row(turns: list[_Turn], names: list[str], where: str) -> Row:
    messages = [_message(turn) for turn in turns]
    shown = [piece.name for turn in turns for piece in turn.pieces if isinstance(piece, _Picture)]
    if shown.count(None) != len(names):
        raise _Refused(MISMATCH, f"{shown.count(None)} {PLACEHOLDER} placeholders for {len(names)} images")
    given = iter(names)
    images = tuple(next(given) if name is None else name for name in shown)
    answers = [message for message in messages if message["role"] == "assistant"]
    if all("weight" in answer for answer in answers):
        raise _Refused(NOTHING_TO_LEARN, f"{len(answers)} assistant turns, all empty or of weight 0")
    for text in (*images, *(piece for turn in turns for piece in turn.pieces if isinstance(piece, str))):
        if not _is_unicode(text):
            raise _Refused("a text is not valid Unicode", reprlib.repr(text))
    return Row(images, messages, where)


def _message(turn: _Turn) -> dict[str, Any]:
    """A chat message. An empty answer is not learned: it would teach to say nothing."""
    pieces = [piece.strip() if isinstance(piece, str) else piece for piece in turn.pieces]
    if turn.role == "user" and any(isinstance(piece, _Picture) for piece in pieces):
        parts = [{"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"} for piece in pieces]
        return {"role": turn.role, "content": [part for part in parts if part.get("text") != ""]}
    texts = [piece for piece in pieces if isinstance(piece, str)]
    if len(texts) < len(pieces):
        raise _Refused("an image is shown in a turn that is not the user's", reprlib.repr(turn.pieces))
    message: dict[str, Any] = {"role": turn.role, "content": "\n".join(texts).strip()}
    if turn.role == "assistant" and (turn.weight == 0 or not message["content"]):
        message["weight"] = 0
    return message


def _is_unicode(text: str) -> bool:
    """JSON can spell half a character, which no file name and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
