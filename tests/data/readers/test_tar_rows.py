"""webdataset: files of one key are one record."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basalt.data.readers import DataError, DataSet, Row, Unusable, read_rows

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


def write(path: Path, files: list[tuple[str, bytes | dict[str, Any]]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            held = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(held)
            archive.addfile(member, io.BytesIO(held))
    return path


def rows(data: DataSet) -> list[Row]:
    found = list(data.rows())
    assert all(isinstance(row, Row) for row in found), found
    return [row for row in found if isinstance(row, Row)]


def test_captions_and_records_beside_their_images(tmp_path: Path) -> None:
    files: list[tuple[str, bytes | dict[str, Any]]] = [
        ("000.jpg", b"first"),
        ("000.txt", b"a dog ."),
        ("001.json", {"id": 1, "conversations": TURNS}),
        ("001.png", b"second"),
        ("deep/002.json", {"conversations": TURNS[1:]}),
        ("003.txt", b"a cat ."),
        ("003.json", {"url": "https://example.org", "image": "elsewhere.jpg"}),
        ("003.webp", b"third"),
        ("003.cls", b"7"),
        ("._003.jpg", b"of a Mac"),
    ]
    data = DataSet(write(tmp_path / "a.tar", files))
    found = rows(data)
    assert [row.where for row in found] == ["a.tar, 000", "a.tar, 001", "a.tar, deep/002", "a.tar, 003"]
    assert [[data.read(name) for name in row.images] for row in found] == [[b"first"], [b"second"], [], [b"third"]]
    assert data.size(found[3].images[0]) == 5
    assert [row.messages[-1]["content"] for row in found] == ["A dog.", "A dog.", "A dog.", "A cat."]


def test_several_images_of_one_key(tmp_path: Path) -> None:
    record = {"conversations": [{"from": "human", "value": "<image><image>"}, TURNS[1]]}
    data = DataSet(write(tmp_path / "a.tar", [("0.a.jpg", b"first"), ("0.b.jpg", b"second"), ("0.json", record)]))
    (row,) = rows(data)
    assert [data.read(name) for name in row.images] == [b"first", b"second"]


@pytest.mark.parametrize("named", ["shards", "shards/x-{08..10}.tar", "shards/x-{08,09,10}.tar"])
def test_shards_are_read_in_order(tmp_path: Path, named: str) -> None:
    (tmp_path / "shards").mkdir()
    for number in (10, 9, 8):
        files: list[tuple[str, bytes | dict[str, Any]]] = [("0.jpg", str(number).encode()), ("0.txt", b"A dog.")]
        write(tmp_path / "shards" / f"x-{number:02d}.tar", files)
    data = DataSet(tmp_path / named)
    names = [name for row in rows(data) for name in row.images]
    assert names == sorted(names)
    assert [data.read(name) for name in names] == [b"8", b"9", b"10"]
    with pytest.raises(DataError, match="holds no image '//00000/7'"):
        data.size("//00000/7")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("0.jpg", b"x")], "has none of"),
        ([("0.json", b"{")], "cannot be read"),
        ([("0.jpg", b"x"), ("0.txt", b"\xff")], "cannot be read"),
        ([("0.json", b"[]")], "not an object"),
        ([("0.txt", b"A dog.")], "without an 'image'"),
    ],
)
def test_a_key_that_gives_no_row_is_told(tmp_path: Path, files: list[tuple[str, bytes]], reason: str) -> None:
    bad, good = read_rows(write(tmp_path / "a.tar", [*files, ("1.jpg", b"x"), ("1.txt", b"A dog.")]))
    assert isinstance(bad, Unusable)
    assert reason in bad.reason
    assert bad.where == "a.tar, 0"
    assert isinstance(good, Row)


def test_a_packed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match=r"a\.tar is not a plain tar .* without compression"):
        list(read_rows(tmp_path / "a.tar"))


@settings(deadline=None, max_examples=150)
@given(st.binary(), st.integers(0, 4000), st.integers(0, 255))
def test_no_damage_raises_anything_but_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, soup: bytes, at: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    write(path, [("0.jpg", b"first"), ("0.txt", b"A dog."), ("1.jpg", b"x"), ("1.json", {"conversations": TURNS})])
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
            assert "damaged.tar" in str(error)
