"""Parquet as Hugging Face writes it: every form of record, images inside, and nothing read twice."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basalt.data.readers import DataError, DataSet, Row, Unusable, read_rows

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


def held(content: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": content, "path": path}


def write(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def rows(data: DataSet) -> list[Row]:
    found = list(data.rows())
    assert all(isinstance(row, Row) for row in found), found
    return [row for row in found if isinstance(row, Row)]


def messages(shown: int = 1) -> list[dict[str, Any]]:
    """With the nulls that a column of structs has."""
    parts = [{"type": "image", "text": None}] * shown + [{"type": "text", "text": "What?"}]
    said = [{"type": "text", "text": "A dog."}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [held(b"first")], "conversations": [TURNS]},
        {"images": [[held(b"first", "x.jpg")]], "messages": [messages()]},
        {"images": [[held(b"first")]], "texts": [[{"user": "What?", "assistant": "A dog."}]]},
        {"image": [b"first"], "question": ["What?"], "answer": ["A dog."]},
        {"image": [held(b"first")], "question": ["What?"], "answer": ["A dog."], "images": [[held(b"unread")]]},
    ],
)
def test_every_form_with_its_image_inside(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    data = DataSet(write(tmp_path / "a.parquet", {"id": [7], **columns}))
    (row,) = rows(data)
    assert row.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A dog."},
    ]
    assert row.where == "a.parquet, row 0"
    assert data.read(row.images[0]) == b"first"
    assert data.size(row.images[0]) == 5


@pytest.mark.parametrize("captions", [{"caption": ["a dog ."]}, {"captions": [["a dog ."]]}])
def test_captions(tmp_path: Path, captions: dict[str, Any]) -> None:
    (row,) = rows(DataSet(write(tmp_path / "a.parquet", {"image": [held(b"first")], **captions})))
    assert row.messages[1]["content"] == "A dog."


def test_images_may_be_named_and_be_beside_the_rows(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").write_bytes(b"beside")
    for number, image in enumerate(("x.jpg", held(None, "x.jpg"))):
        path = write(tmp_path / f"{number}.parquet", {"image": [image], "caption": ["A dog."]})
        data = DataSet(path, tmp_path / "images")
        (row,) = rows(data)
        assert row.images == ("x.jpg",)
        assert data.read("x.jpg") == b"beside"


def test_a_row_without_an_image_is_text_or_unusable(tmp_path: Path) -> None:
    columns = {"image": [None, held(None), held(b"x")], "conversations": [TURNS[1:], TURNS, TURNS]}
    said, lost, shown = read_rows(write(tmp_path / "a.parquet", columns))
    assert isinstance(said, Row)
    assert said.images == ()
    assert isinstance(lost, Unusable)
    assert isinstance(shown, Row)


@pytest.mark.parametrize("image", [{"link": "x"}, 7, [7], [[b"x"]]])
def test_what_is_no_image_is_told(tmp_path: Path, image: Any) -> None:
    (bad,) = read_rows(write(tmp_path / "a.parquet", {"image": [image], "caption": ["A dog."]}))
    assert isinstance(bad, Unusable)
    assert "neither a name nor a list of names" in bad.reason


def test_names_sort_as_rows_and_each_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        images = [[held(f"{shard}/{row}/{n}".encode()) for n in range(2)] for row in range(25)]
        columns = {"images": images, "messages": [messages(2)] * 25}
        write(shards / f"train-{shard:05d}-of-00002.parquet", columns, row_group_size=4)
    data = DataSet(shards)
    names = [name for row in rows(data) for name in row.images]
    assert names == sorted(names)
    read: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda file, group, **options: (
            read.append(group), read_row_group(file, group, **options)
        )[1],
    )  # fmt: skip
    wanted = [f"{shard}/{row}/{n}".encode() for shard in range(2) for row in range(25) for n in range(2)]
    assert [data.read(name) for name in names] == wanted
    assert read == [*range(7), *range(7)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(data.read, names)) == wanted


@pytest.mark.parametrize(
    ("columns", "says"), [({"x": [1]}, "its columns are x, and one of conversations"), ({}, "one of conversations")]
)
def test_parquet_without_records_is_refused(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=rf"a\.parquet cannot be read as parquet: .*{says}"):
        list(read_rows(write(tmp_path / "a.parquet", columns)))


@settings(deadline=None, max_examples=60)
@given(st.binary(), st.integers(0, 2000), st.integers(0, 255))
def test_no_damage_raises_anything_but_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, soup: bytes, at: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    write(path, {"image": [held(b"first" * 20)] * 9, "conversations": [TURNS] * 9})
    whole = bytearray(path.read_bytes())
    whole[at % len(whole)] ^= byte
    for content in (soup, bytes(whole), bytes(whole[:at])):
        path.write_bytes(content)
        try:
            data = DataSet(path)
            for row in data.rows():
                for name in row.images if isinstance(row, Row) else ():
                    data.read(name)
        except DataError as error:
            assert "damaged.parquet" in str(error)
