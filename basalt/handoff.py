"""Embeddings on their way from the vision service to the LLM service, in memory that both see.

One safetensors file per digest in a directory of shared memory (`/dev/shm`): written once by the vision service, mapped
by the LLM service, and meanwhile the vision service's nearest cache. Through the gateway goes the digest alone. Where
the two services share no directory, the gateway carries the same bytes.
"""

import json
import mmap
import os
import re
import struct
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TENSOR = "embeddings"  # the one tensor of a blob
DTYPES = {"bfloat16": "BF16", "float32": "F32"}  # as safetensors names them
MISSED = "image_embeds.reference"  # the `param` of the LLM service's error where a reference leads nowhere
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def default_directory() -> Path:
    """Of this user, in shared memory where the system has it."""
    shared = Path("/dev/shm")
    return shared / f"basalt-{os.getuid()}" if os.access(shared, os.W_OK) else Path("var/handoff")


@dataclass(frozen=True)
class Blob:
    """Visual tokens of one image: row-major little-endian values of `shape` [tokens, lm_dim]."""

    data: bytes | memoryview
    shape: tuple[int, int]
    dtype: str

    def header(self) -> bytes:
        """safetensors' framing: length, JSON. Written here because the library's writer takes tensors' addresses, and
        not every service has tensors."""
        tensor = {"dtype": DTYPES[self.dtype], "shape": self.shape, "data_offsets": [0, len(self.data)]}
        header = json.dumps({TENSOR: tensor}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header

    @classmethod
    def parse(cls, blob: "bytes | mmap.mmap") -> "Blob":
        """A blob that `header` and the data make.

        Raises:
            ValueError: it is none.
        """
        try:
            (length,) = struct.unpack_from("<Q", blob)
            tensor = json.loads(blob[8 : 8 + length])[TENSOR]
            names = {name: ours for ours, name in DTYPES.items()}
            tokens, width = tensor["shape"]
            found = cls(memoryview(blob)[8 + length :], (tokens, width), names[tensor["dtype"]])
        except (struct.error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a blob of embeddings: {error}") from None
        if len(found.data) != tokens * width * {"bfloat16": 2, "float32": 4}[found.dtype]:
            raise ValueError("not a blob of embeddings: it is cut off")
        return found


def handoff_path(directory: Path, digest: str) -> Path | None:
    """The file of a digest; None if that is no digest."""
    found = _DIGEST.fullmatch(digest)
    return directory / found[1] if found else None


class HandoffDirectory:
    """The writing side: at most `capacity` bytes, the least recently used going first. What an earlier process left
    is taken over, its names say what it is."""

    def __init__(self, directory: Path, capacity: int) -> None:
        self._directory = directory
        self._capacity = capacity
        self._sizes: OrderedDict[str, int] = OrderedDict()  # by file name, least recently used first
        self.used = 0  # bytes
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = [(path, path.stat()) for path in directory.iterdir() if _DIGEST.fullmatch(f"sha256:{path.name}")]
        for path, status in sorted(found, key=lambda each: each[1].st_mtime):
            self._count(path.name, status.st_size)

    def get(self, digest: str) -> Blob | None:
        path = handoff_path(self._directory, digest)
        if path is None or path.name not in self._sizes:
            return None
        try:
            with path.open("rb") as file:
                blob = Blob.parse(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        except (OSError, ValueError):  # somebody else has cleared the directory
            self._forget(path.name)
            return None
        self._sizes.move_to_end(path.name)
        return blob

    def touch(self, digest: str) -> bool:
        """Whether the digest's file is there. Its turn to go is put off."""
        path = handoff_path(self._directory, digest)
        if path is None or path.name not in self._sizes:
            return False
        try:
            os.utime(path)
        except OSError:
            self._forget(path.name)
            return False
        self._sizes.move_to_end(path.name)
        return True

    def put(self, digest: str, blob: Blob) -> bool:
        """Whether it could be written: shared memory may be full or missing."""
        path = handoff_path(self._directory, digest)
        header = blob.header()
        size = len(header) + len(blob.data)
        if path is None or size > self._capacity:
            return False
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        self._make_room(size)
        try:
            with unfinished.open("wb") as file:
                file.write(header)
                file.write(blob.data)
            unfinished.rename(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            return False
        self._count(path.name, size)
        return True

    def _make_room(self, size: int) -> None:
        while self._sizes and self.used + size > self._capacity:
            name = next(iter(self._sizes))
            self._forget(name)
            with suppress(OSError):
                (self._directory / name).unlink()

    def _count(self, name: str, size: int) -> None:
        self._forget(name)
        self._sizes[name] = size
        self.used += size

    def _forget(self, name: str) -> None:
        self.used -= self._sizes.pop(name, 0)
