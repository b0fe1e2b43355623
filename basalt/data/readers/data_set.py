"""A data set: rows in any of the formats, and their images, inside the rows' files or beside them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from basalt.data.readers.files import Images, ImageSource
from basalt.data.readers.json_rows import JsonRows
from basalt.data.readers.rows import DataError, Record, Row, Unusable, is_inside, rows_of
from basalt.data.readers.tar_rows import TarRows

PROMPTS = ("Describe the image.",)
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


class _RowFiles(Images, Protocol):
    """The files of one format. The images inside them are known once their records were read."""

    def records(self) -> Iterator[Record | Unusable]: ...


class DataSet:
    """Rows and their images by name (see `Images`).

    Args:
        rows: `.json`, `.jsonl`, `.parquet` or `.tar`; a folder of shards of the last two, or their names in one
            pattern, `train-{000..127}.tar`.
        images: the folder or tar of the images that rows name.

    Raises:
        DataError: there is no such file, or its format cannot be told.
    """

    def __init__(self, rows: Path, images: Path | None = None) -> None:
        self.rows_path = rows
        self.path = images or rows
        self._inside = _row_files(rows)
        self._beside = None if images is None else ImageSource(images)

    def rows(self, prompts: Sequence[str] = PROMPTS) -> Iterator[Row | Unusable]:
        """The rows in order; what a record cannot give is `Unusable`. Captions answer the `prompts` in turn.

        Raises:
            DataError: a file is not what it says, or rows name images and there is nowhere to look for them.
        """
        for row in _rows(self._inside, prompts):
            if isinstance(row, Row) and self._beside is None:
                self._check_inside(row)
            yield row

    def size(self, name: str) -> int:
        return self._home(name).size(name)

    def read(self, name: str) -> bytes:
        return self._home(name).read(name)

    def _check_inside(self, row: Row) -> None:
        outside = next((name for name in row.images if not is_inside(name)), None)
        if outside is not None:
            raise DataError(
                f"{self.rows_path}, {row.where} names the image {outside!r}: name its folder or tar as `images`"
            )

    def _home(self, name: str) -> Images:
        return self._inside if self._beside is None or is_inside(name) else self._beside


def read_rows(path: Path, prompts: Sequence[str] = PROMPTS) -> Iterator[Row | Unusable]:
    """The rows of a data set whose images are not asked for.

    Raises:
        DataError: a file is not what it says.
    """
    return _rows(_row_files(path), prompts)


def _rows(files: _RowFiles, prompts: Sequence[str]) -> Iterator[Row | Unusable]:
    for number, record in enumerate(files.records()):
        if isinstance(record, Unusable):
            yield record
        else:
            yield from rows_of(record, prompts[number % len(prompts)])


def _row_files(path: Path) -> _RowFiles:
    shards = find_shards(path)
    formats = {shard.suffix for shard in shards}
    if formats == {".parquet"}:
        from basalt.data.readers.parquet_rows import ParquetRows  # pyarrow comes with training, not with serving

        return ParquetRows(path, shards)
    if formats == {".tar"}:
        return TarRows(path, shards)
    if len(shards) == 1:
        return JsonRows(path)
    raise DataError(f"{path} holds {' and '.join(sorted(formats))} files: name those of one format, .parquet or .tar")


def find_shards(path: Path) -> list[Path]:
    """The files of a path of rows: itself, those in a folder, or those that a pattern in braces names."""
    if path.is_dir():
        shards = sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".tar"))
        if not shards:
            raise DataError(f"{path} holds no .parquet and no .tar: JSON rows are named by their file")
        return shards
    shards = [path] if path.is_file() else [Path(name) for name in _expanded(str(path))]
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing}: there is no such file of rows")
    return shards


def _expanded(pattern: str) -> Iterator[str]:
    """`a-{08..10}.tar` → `a-08.tar`, `a-09.tar`, `a-10.tar`; `{a,b}.tar` → `a.tar`, `b.tar`."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    first, last, names = found.groups()
    choices = names.split(",") if names else (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    for choice in choices:
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])
