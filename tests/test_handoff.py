"""The hand-off directory: exact bytes, a byte budget by use, nothing half written."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from basalt.handoff import Blob, HandoffDirectory, handoff_path


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def blob(fill: int = 0, tokens: int = 4) -> Blob:
    return Blob(bytes([fill]) * (tokens * 8 * 4), (tokens, 8), "float32")


def test_what_is_put_is_got_and_is_safetensors(tmp_path: Path):
    directory = HandoffDirectory(tmp_path, 10_000)
    assert directory.put(digest(1), blob(3))
    found = directory.get(digest(1))
    assert found is not None
    assert (bytes(found.data), found.shape, found.dtype) == (blob(3).data, (4, 8), "float32")
    path = handoff_path(tmp_path, digest(1))
    assert path is not None
    assert load(path.read_bytes())["embeddings"].tobytes() == blob(3).data


def test_the_least_recently_used_goes_first(tmp_path: Path):
    one = len(blob().header()) + len(blob().data)
    directory = HandoffDirectory(tmp_path, 2 * one)
    directory.put(digest(1), blob())
    directory.put(digest(2), blob())
    directory.get(digest(1))
    directory.put(digest(3), blob())
    assert [directory.get(digest(n)) is not None for n in (1, 2, 3)] == [True, False, True]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == directory.used == 2 * one


def test_an_open_reader_keeps_what_has_to_go(tmp_path: Path):
    directory = HandoffDirectory(tmp_path, 300)
    directory.put(digest(1), blob(7))
    reader = directory.get(digest(1))
    directory.put(digest(2), blob(8))
    assert directory.get(digest(1)) is None
    assert reader is not None
    assert bytes(reader.data) == blob(7).data


def test_too_large_or_nowhere_to_write(tmp_path: Path):
    assert not HandoffDirectory(tmp_path / "a", 100).put(digest(1), blob())
    directory = HandoffDirectory(tmp_path / "b", 10_000)
    (tmp_path / "b").rmdir()
    assert not directory.put(digest(1), blob())
    assert directory.get(digest(1)) is None


def test_a_file_that_somebody_removed_or_cut_is_a_miss(tmp_path: Path):
    directory = HandoffDirectory(tmp_path, 10_000)
    for number in (1, 2, 3):
        directory.put(digest(number), blob())
    paths = [handoff_path(tmp_path, digest(n)) for n in (1, 2, 3)]
    assert all(paths)
    paths[0].unlink()  # type: ignore[union-attr]
    paths[1].write_bytes(b"")  # type: ignore[union-attr]
    paths[2].write_bytes(paths[2].read_bytes()[:-1])  # type: ignore[union-attr]
    assert [directory.get(digest(n)) for n in (1, 2, 3)] == [None, None, None]


@pytest.mark.parametrize("name", ["../secret", "sha256:..", "sha256:" + 64 * "G", "sha256:" + 63 * "a", "a" * 64, ""])
def test_only_digests_name_files(tmp_path: Path, name: str):
    assert handoff_path(tmp_path, name) is None


@given(st.binary(max_size=300))
def test_rubbish_is_no_blob(data: bytes):
    with pytest.raises(ValueError, match="not a blob"):
        Blob.parse(data)


@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from(["float32", "bfloat16"]))
def test_a_blob_is_read_back(tokens: int, width: int, dtype: str):
    data = bytes(range(tokens * width)) * {"float32": 4, "bfloat16": 2}[dtype]
    written = Blob(data, (tokens, width), dtype)
    read = Blob.parse(written.header() + data)
    assert (bytes(read.data), read.shape, read.dtype) == (data, (tokens, width), dtype)
