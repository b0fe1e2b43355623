"""Training rows from the formats people have: LLaVA JSON and caption JSONL, images in a folder or a tar.

Every reader gives `Row`s; nothing is read into memory but text and the index of the images.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class DataError(ValueError):
    """A data file is not what it says. The message names file and row, and what would be right."""


@dataclass(frozen=True)
class Row:
    """One conversation, about the images of its source that `images` names in the order they are shown.

    `messages` are chat messages; a user's content may be a list of `{"type": "image"}` and
    `{"type": "text", "text": …}` parts, in order.
    """

    images: tuple[str, ...]
    messages: list[dict[str, Any]] = field(hash=False)


class ImageSource:
    """The images of a data set by name: a folder, or a plain tar that is read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, tuple[int, int]] | None = None
        if path.is_file():
            try:
                with tarfile.open(path, "r:") as archive:
                    self._offsets = {
                        member.name.removeprefix("./"): (member.offset_data, member.size)
                        for member in archive
                        if member.isfile()
                    }
            except tarfile.TarError as error:
                raise DataError(
                    f"{path} is not a plain tar of images ({error}): unpack it, or pack it again"
                ) from error
        elif not path.is_dir():
            raise DataError(f"{path} is neither a folder nor a tar file of images")

    def size(self, name: str) -> int:
        """The size of one image in bytes.

        Raises:
            DataError: the source has no such image.
        """
        return self._locate(name)[2]

    def read(self, name: str) -> bytes:
        """The original bytes of one image.

        Raises:
            DataError: the source has no such image.
        """
        path, offset, size = self._locate(name)
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _locate(self, name: str) -> tuple[Path, int, int]:
        """The file that holds an image, where in it the image begins, and its size."""
        if self._offsets is not None and name in self._offsets:
            return self.path, *self._offsets[name]
        file = (self.path / name).resolve()
        if self._offsets is None and file.is_relative_to(self.path.resolve()) and file.is_file():
            return file, 0, file.stat().st_size
        raise DataError(f"{self.path} holds no image {name!r}")


def read_rows(path: Path, prompts: list[str]) -> Iterator[Row]:
    """Rows of a data file by its form: `.json` is LLaVA JSON, `.jsonl` has captions, questions or conversations.

    `prompts` are what a caption answers; they are taken in turn.
    """
    for number, record in enumerate(read_records(path)):
        where = f"{path}, row {number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, found {type(record).__name__}")
        if "conversations" in record:
            yield _conversation(record, where)
            continue
        if not isinstance(record.get("image"), str):
            raise DataError(f"{where}: a caption or question needs the name of its picture as 'image'")
        if "captions" in record:
            for caption in record["captions"]:
                yield _exchange(record["image"], prompts[number % len(prompts)], _sentence(caption))
        elif "question" in record and "answer" in record:
            yield _exchange(record["image"], record["question"], str(record["answer"]))
        else:
            raise DataError(f"{where}: has none of 'conversations', 'captions' or 'question' with 'answer'")


def read_records(path: Path) -> Iterator[Any]:
    """The records of a data file as they stand: of a `.jsonl` its lines, else of one JSON list."""
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.strip():
                        yield json.loads(line)
        else:
            records = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(records, list):
                raise DataError(f"{path}: expected a list of rows, found {type(records).__name__}")
            yield from records
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def _exchange(image: str, question: str, answer: str) -> Row:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return Row((image,), [{"role": "user", "content": content}, {"role": "assistant", "content": answer.strip()}])


def _sentence(caption: str) -> str:
    """Captions of the classic sets come tokenised (`"a dog runs ."`): written as people write."""
    text = re.sub(r"\s+([.,;:!?])", r"\1", caption.strip())
    return text[:1].upper() + text[1:]


def _conversation(record: dict[str, Any], where: str) -> Row:
    """LLaVA's own form: `image` is a name, or a list of them; `<image>` stands for each in a human's turn."""
    named = record.get("image") or []
    if not isinstance(named, str | list) or not all(isinstance(name, str) for name in named):
        raise DataError(f"{where}: 'image' is the name of a picture or a list of names, found {named!r}")
    images = (named,) if isinstance(named, str) else tuple(named)
    messages, placeholders = [], 0
    for turn in record["conversations"]:
        role, value = ROLES.get(turn.get("from")), turn.get("value")
        if role is None or not isinstance(value, str):
            raise DataError(f"{where}: a turn needs 'from' (human or gpt) and a 'value' of text, found {turn}")
        if role == "user" and PLACEHOLDER in value:
            placeholders += value.count(PLACEHOLDER)
            messages.append({"role": role, "content": _parts(value)})
        else:
            messages.append({"role": role, "content": value.strip()})
    if placeholders != len(images):
        raise DataError(f"{where}: {placeholders} {PLACEHOLDER} placeholders for {len(images)} images")
    return Row(images, messages)


def _parts(value: str) -> list[dict[str, str]]:
    """`"<image>\\nWhat?"` → an image part and a text part, in order."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(value.split(PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
    return parts
