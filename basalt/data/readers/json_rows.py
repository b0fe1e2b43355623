"""JSON: one list of records, as LLaVA's, or one record a line, as OpenAI's, which may hold images as data: URLs."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from basalt.data.readers.rows import INSIDE, NOT_JSON, DataError, Record, Unusable

_BLANK = re.compile(r"[ \t\r\n]*")


class JsonRows:
    """The records of a `.jsonl` file, or of one JSON list, and the images in their data: URLs, read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sizes: dict[str, int] = {}  # of the images in data: URLs, known once their line was read

    def records(self) -> Iterator[Record | Unusable]:
        """The records in order; a line that is not JSON is unusable.

        Raises:
            DataError: there is no such file, or it is not JSON at all.
        """
        try:
            yield from self._lines() if self.path.suffix == ".jsonl" else self._list()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error

    def size(self, name: str) -> int:
        if name not in self._sizes:
            raise DataError(f"{self.path} holds no image {name!r}")
        return self._sizes[name]

    def read(self, name: str) -> bytes:
        self.size(name)
        offset, number = name.removeprefix(INSIDE).split("/")
        with self.path.open("rb") as file:
            file.seek(int(offset))
            holders = list(_data_urls(json.loads(file.readline())))
        return _decoded(holders[int(number)]["url"])

    def _lines(self) -> Iterator[Record | Unusable]:
        offset, begun = 0, False
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found = self._line(f"line {number}", line, offset)
                    if not begun and isinstance(found, Unusable) and found.reason == NOT_JSON:
                        raise DataError(f"{self.path} is not JSON lines, one record a line: {found.found}")
                    begun = True
                    yield found
                offset += len(line)

    def _line(self, where: str, line: bytes, offset: int) -> Record | Unusable:
        """The record of a line, names in the place of its data: URLs."""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Unusable(where, NOT_JSON, str(error))
        try:
            for number, holder in enumerate(_data_urls(fields)):
                name = f"{INSIDE}{offset:015d}/{number:04d}"
                self._sizes[name] = len(_decoded(holder["url"]))
                holder["url"] = name
        except ValueError as error:
            return Unusable(where, "a data: URL cannot be read", str(error))
        return Record(where, fields)

    def _list(self) -> Iterator[Record]:
        try:
            for number, fields in enumerate(_elements(self.path.read_text(encoding="utf-8-sig"))):
                yield Record(f"row {number}", fields)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is not a JSON list of rows: {error}") from error


def read_records(path: Path) -> Iterator[Any]:
    """The records of a JSON file as they stand.

    Raises:
        DataError: it is not JSON, or a line is not.
    """
    for record in JsonRows(path).records():
        if isinstance(record, Unusable):
            raise DataError(f"{path}, {record.where} is not valid JSON: {record.found}")
        yield record.fields


def _elements(text: str) -> Iterator[Any]:
    """Decodes a JSON list one by one: all its objects at once take several times the room of its text.

    Raises:
        ValueError: it is not one.
    """

    def skip(at: int) -> int:
        found = _BLANK.match(text, at)
        return found.end() if found else at

    at = skip(0)
    if text[at : at + 1] != "[":
        raise ValueError(f"it is one {type(json.loads(text)).__name__}")
    decoder = json.JSONDecoder()
    at = skip(at + 1)
    more = text[at : at + 1] != "]"
    while more:
        element, at = decoder.raw_decode(text, at)
        yield element
        at = skip(at)
        more = text[at : at + 1] == ","
        at = skip(at + 1) if more else at
    if text[at : at + 1] != "]" or skip(at + 1) < len(text):
        raise json.JSONDecodeError("Expecting ',' between rows and ']' after the last", text, at)


def _data_urls(fields: Any) -> Iterator[dict[str, Any]]:
    """The `{"url": "data:…"}` of a record's messages, in order."""
    messages = fields.get("messages") if isinstance(fields, dict) else None
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            holder = part.get("image_url") if isinstance(part, dict) else None
            url = holder.get("url") if isinstance(holder, dict) else None
            if isinstance(holder, dict) and isinstance(url, str) and url.startswith("data:"):
                yield holder


def _decoded(url: str) -> bytes:
    header, _, body = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError("a data: URL of an image is data:image/…;base64,…")
    return base64.b64decode(body, validate=True)
