"""Writes files in the forms in which benchmarks are published."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def picture(colour: str = "red") -> dict[str, Any]:
    """A picture as Hugging Face datasets keep it."""
    return {"bytes": png(colour), "path": f"{colour}.png"}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], images: Sequence[str] = ("image",)) -> Path:
    """Rows with pictures, or none, in the columns `images`."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {name: pa.array([row.get(name) for row in rows]) for name in rows[0] if name not in images}
    pictures = {name: pa.array([row.get(name) for row in rows], kind) for name in images}
    parquet.write_table(pa.table(columns | pictures), path, row_group_size=2)
    return path
