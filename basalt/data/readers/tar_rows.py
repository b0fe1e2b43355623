"""webdataset: tars whose files of one key are one record, `key.jpg` beside `key.json` or `key.txt`."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from tarfile import TarInfo
from typing import Any, BinaryIO

from basalt.data.readers.files import tar_members
from basalt.data.readers.rows import INSIDE, DataError, Record, Unusable

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class TarRows:
    """The records of webdataset shards, and their images, read in place."""

    def __init__(self, path: Path, shards: list[Path]) -> None:
        self.path = path
        self._shards = shards
        self._sizes: dict[str, int] = {}  # of the images, known once their shard was read

    def records(self) -> Iterator[Record | Unusable]:
        """The records in order. A `key.json` is a record of any form, without its images; a `key.txt` is a caption.

        Raises:
            DataError: a shard is no plain tar.
        """
        for number, shard in enumerate(self._shards):
            members = (member for member in tar_members(shard) if not PurePosixPath(member.name).name.startswith("."))
            with shard.open("rb") as file:
                for key, same in groupby(members, key=_key):
                    yield self._record(f"{shard.name}, {key}", list(same), file, number)

    def size(self, name: str) -> int:
        if name not in self._sizes:
            raise DataError(f"{self.path} holds no image {name!r}")
        return self._sizes[name]

    def read(self, name: str) -> bytes:
        size = self.size(name)
        shard, offset = name.removeprefix(INSIDE).split("/")
        with self._shards[int(shard)].open("rb") as file:
            file.seek(int(offset))
            return file.read(size)

    def _record(self, where: str, members: list[TarInfo], file: BinaryIO, shard: int) -> Record | Unusable:
        images: list[str] = []
        texts: dict[str, bytes] = {}
        for member in members:
            suffix = PurePosixPath(member.name).suffix.lower()
            if suffix in PICTURES:
                images.append(f"{INSIDE}{shard:05d}/{member.offset_data:015d}")
                self._sizes[images[-1]] = member.size
            elif suffix in (".json", ".txt"):
                file.seek(member.offset_data)
                texts[suffix] = file.read(member.size)
        try:
            caption = {"caption": texts[".txt"].decode()} if ".txt" in texts else {}
            fields: Any = json.loads(texts.get(".json", b"{}"))
        except (ValueError, RecursionError) as error:
            return Unusable(where, "its .json or .txt cannot be read", str(error))
        if isinstance(fields, dict):
            fields = caption | fields | {"image": images, "images": None}
        return Record(where, fields)


def _key(member: TarInfo) -> str:
    """`deep/0007.seg.png` → `deep/0007`: a key ends at the first dot of the file's name."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]
