"""Parquet as Hugging Face writes it: records in columns, images inside as `{bytes, path}`, or their names."""

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from basalt.data.readers.rows import FIELDS, FORMS, INSIDE, DataError, Record

BATCH = 64  # rows in memory together, images included


class ParquetRows:
    """The records of parquet shards, and the images inside them, read in place.

    An image is read with its row group, of which the last two are kept: reading in the order of names, which is
    that of rows, reads the file once.
    """

    def __init__(self, path: Path, shards: list[Path]) -> None:
        self.path = path
        self._shards = shards
        self._sizes: dict[str, int] = {}  # of the images, known once their rows were read
        self._lock = threading.Lock()
        self._group_starts = lru_cache(maxsize=None)(self._read_group_starts)
        self._pictures = lru_cache(maxsize=2)(self._read_pictures)

    def records(self) -> Iterator[Record]:
        """The records in order.

        Raises:
            DataError: a shard is not parquet, or has no column of a record.
        """
        for number, shard in enumerate(self._shards):
            try:
                for row, fields in enumerate(_rows(shard)):
                    self._take_out(fields, f"{INSIDE}{number:05d}/{row:010d}")
                    yield Record(f"{shard.name}, row {row}", fields)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DataError(f"{shard} cannot be read as parquet: {error}") from error

    def size(self, name: str) -> int:
        if name not in self._sizes:
            raise DataError(f"{self.path} holds no image {name!r}")
        return self._sizes[name]

    def read(self, name: str) -> bytes:
        self.size(name)
        shard, row, number = map(int, name.removeprefix(INSIDE).split("/"))
        try:
            with self._lock:  # or two threads would read the same row group
                starts = self._group_starts(shard)
                group = bisect_right(starts, row) - 1
                value = self._pictures(shard, group)[row - starts[group]].as_py()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._shards[shard]} cannot be read as parquet: {error}") from error
        picture = _listed(value)[number]
        return picture["bytes"] if isinstance(picture, dict) else picture

    def _take_out(self, fields: dict[str, Any], place: str) -> None:
        """Puts names in the place of a row's images."""
        column = _image_column(fields)
        if column is None:
            return
        names = _listed(fields[column])
        for number, picture in enumerate(names):
            held, path = (
                (picture.get("bytes"), picture.get("path")) if isinstance(picture, dict) else (picture, picture)
            )
            names[number] = path
            if isinstance(held, bytes):
                names[number] = f"{place}/{number:04d}"
                self._sizes[names[number]] = len(held)
        fields[column] = names

    def _read_group_starts(self, shard: int) -> list[int]:
        """The first row of each row group."""
        metadata = pq.read_metadata(self._shards[shard])
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return list(accumulate(counts[:-1], initial=0))

    def _read_pictures(self, shard: int, group: int) -> pa.ChunkedArray:
        with pq.ParquetFile(self._shards[shard]) as file:
            column = _image_column(file.schema_arrow.names)
            return file.read_row_group(group, columns=[column]).column(column)


def _rows(shard: Path) -> Iterator[dict[str, Any]]:
    """The rows of one shard, only the columns that a record has."""
    with pq.ParquetFile(shard, pre_buffer=False) as file:
        names = file.schema_arrow.names
        if not set(names) & set(FORMS):
            raise ValueError(f"its columns are {', '.join(names)}, and one of {', '.join(FORMS)} is needed")
        unread = "images" if "image" in names else None
        columns = [name for name in names if name in FIELDS and name != unread]
        for batch in file.iter_batches(BATCH, columns=columns):
            yield from batch.to_pylist()


def _image_column(columns: Iterable[str]) -> str | None:
    return next((name for name in ("image", "images") if name in columns), None)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
