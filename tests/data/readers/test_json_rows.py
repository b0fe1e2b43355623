"""JSON lists and JSON lines: what is read, what is no such file, and images in data: URLs."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basalt.data.readers import DataError, DataSet, Row, Unusable, read_records, read_rows
from basalt.data.readers.rows import NOT_JSON

GOOD = {"image": "x.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dog."}]}


def write(path: Path, records: list[Any]) -> Path:
    lines = "\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records, indent=1)
    path.write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_bad_row_is_told_and_the_next_is_read(tmp_path: Path, name: str) -> None:
    first, bad, last = read_rows(write(tmp_path / name, [GOOD, {**GOOD, "image": None}, GOOD]))
    assert isinstance(first, Row)
    assert first == last
    assert isinstance(bad, Unusable)
    assert bad.where == {"a.json": "row 1", "a.jsonl": "line 2"}[name]


def test_blank_lines_are_nothing_and_text_is_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\n{"image": "ä.jpg", "captions": ["Ein Hündchen"]}\n\n'.encode())
    (row,) = read_rows(path)
    assert isinstance(row, Row)
    assert row.images == ("ä.jpg",)
    assert row.messages[1]["content"] == "Ein Hündchen"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_nothing(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [GOOD])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(list(read_rows(path))) == 1


def test_a_line_that_is_not_json_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, GOOD])
    path.write_text(path.read_text() + '\n{"im')
    *_, bad = read_rows(path)
    assert isinstance(bad, Unusable)
    assert (bad.where, bad.reason) == ("line 3", NOT_JSON)
    with pytest.raises(DataError, match=r"a\.jsonl, line 3 is not valid JSON"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("name", "written", "says"),
    [
        ("a.json", '[{"image": ', "not a JSON list of rows: Expecting value"),
        ("a.json", "", "not a JSON list of rows: Expecting value"),
        ("a.json", json.dumps(GOOD), "not a JSON list of rows: it is one dict"),
        ("a.json", "[1 2]", "Expecting ',' between rows"),
        ("a.json", "[1,]", "Expecting value"),
        ("a.json", "[1] 2", "after the last"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.jsonl", '{"im\n' + json.dumps(GOOD), "not JSON lines, one record a line"),
        ("a.jsonl", json.dumps([GOOD], indent=1), "not JSON lines, one record a line"),
        ("a.jsonl", "[" * 100_000, "not JSON lines"),
    ],
)
def test_what_is_no_json_at_all_is_refused(tmp_path: Path, name: str, written: str, says: str) -> None:
    (tmp_path / name).write_text(written)
    with pytest.raises(DataError, match=rf"{name} is .*{says}"):
        list(read_rows(tmp_path / name))


@settings(deadline=None)
@given(st.lists(st.integers() | st.text() | st.lists(st.none(), max_size=2)), st.sampled_from([None, 1]))
def test_a_list_is_read_as_json_reads_it(tmp_path_factory: pytest.TempPathFactory, records: Any, indent: int) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(records, indent=indent))
    assert list(read_records(path)) == records


@settings(deadline=None, max_examples=300)
@given(st.binary() | st.text(alphabet='[]{}",:\\ "0u').map(str.encode), st.sampled_from([".json", ".jsonl"]))
def test_no_bytes_raise_anything_but_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, soup: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"soup{suffix}"
    path.write_bytes(soup)
    try:
        found = list(read_rows(path))
    except DataError as error:
        assert path.name in str(error)
    else:
        assert all(isinstance(row, Row | Unusable) for row in found)


def asks(*urls: str) -> dict[str, Any]:
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": "A dog."}]}


def data_url(held: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(held).decode()


def test_images_in_data_urls_are_read_from_their_lines(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").write_bytes(b"beside")
    records = [asks(data_url(b"first")), asks("x.jpg", data_url(b"second"), data_url(b"third!"))]
    data = DataSet(write(tmp_path / "a.jsonl", records), tmp_path / "images")
    names = [name for row in data.rows() if isinstance(row, Row) for name in row.images]
    assert [data.read(name) for name in names] == [b"first", b"beside", b"second", b"third!"]
    assert [data.size(name) for name in names] == [5, 6, 6, 6]
    with pytest.raises(DataError, match="holds no image '//000/0'"):
        data.read("//000/0")


@pytest.mark.parametrize("url", ["data:image/png;base64,A", "data:image/png;base64,Ä", "data:image/png,A", "data:"])
def test_data_urls_without_base64_are_told(tmp_path: Path, url: str) -> None:
    (bad,) = read_rows(write(tmp_path / "a.jsonl", [asks(url)]))
    assert isinstance(bad, Unusable)
    assert bad.reason == "a data: URL cannot be read"
