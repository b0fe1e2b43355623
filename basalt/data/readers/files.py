"""Images by name: in a folder, or in a plain tar that is read in place."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from basalt.data.readers.rows import DataError


class Images(Protocol):
    """Where a data set's images are."""

    path: Path

    def size(self, name: str) -> int:
        """The size of one image in bytes.

        Raises:
            DataError: there is no such image.
        """
        ...

    def read(self, name: str) -> bytes:
        """The original bytes of one image.

        Raises:
            DataError: there is no such image.
        """
        ...


class ImageSource:
    """The images of a folder or a tar."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, tuple[int, int]] | None = None
        if path.is_file():
            self._offsets = {
                member.name.removeprefix("./"): (member.offset_data, member.size) for member in tar_members(path)
            }
        elif not path.is_dir():
            raise DataError(f"{path} is neither a folder nor a tar file of images")

    def size(self, name: str) -> int:
        return self._locate(name)[2]

    def read(self, name: str) -> bytes:
        path, offset, size = self._locate(name)
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _locate(self, name: str) -> tuple[Path, int, int]:
        """The file that holds an image, where in it the image begins, and its size."""
        if self._offsets is not None and name in self._offsets:
            return self.path, *self._offsets[name]
        try:
            file = (self.path / name).resolve()
            if self._offsets is None and file.is_relative_to(self.path.resolve()) and file.is_file():
                return file, 0, file.stat().st_size
        except (OSError, ValueError, RuntimeError):  # too long, with a NUL inside, a link to itself: no file's name
            pass
        raise DataError(f"{self.path} holds no image {name!r}")


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files of a tar in order.

    Raises:
        DataError: it is no plain tar, or damaged.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    yield member
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all it has seen
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is not a plain tar ({error}): unpack it, or pack it again without compression"
        ) from error
