import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basalt.data.readers import DataError, ImageSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_bytes(b"secret")
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"first")
    (folder / "deep" / "b.jpg").write_bytes(b"second")
    return folder


def test_images_of_a_folder(folder: Path) -> None:
    source = ImageSource(folder)
    assert source.read("a.jpg") == b"first"
    assert source.read("deep/b.jpg") == b"second"


@pytest.mark.parametrize("prefix", [".", ""])
def test_images_of_a_tar(folder: Path, prefix: str) -> None:
    path = folder.parent / "images.tar"
    with tarfile.open(path, "w") as archive:
        for file in ("a.jpg", "deep/b.jpg"):
            archive.add(folder / file, f"{prefix}/{file}" if prefix else file)
    source = ImageSource(path)
    assert source.read("a.jpg") == b"first"
    assert source.read("deep/b.jpg") == b"second"
    with pytest.raises(DataError, match=r"images\.tar holds no image 'c\.jpg'"):
        source.read("c.jpg")


@pytest.mark.parametrize("name", ["../secret.txt", "deep/../../secret.txt", "missing.jpg", "deep", ""])
def test_nothing_outside_the_folder_is_read(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match="holds no image"):
        ImageSource(folder).read(name)
    with pytest.raises(DataError, match="holds no image"):
        ImageSource(folder).read(str(folder.parent / "secret.txt"))


def test_a_link_that_leads_out_of_the_folder_is_not_followed(folder: Path) -> None:
    (folder / "link.jpg").symlink_to(folder.parent / "secret.txt")
    with pytest.raises(DataError, match="holds no image"):
        ImageSource(folder).read("link.jpg")


def test_a_source_must_be_a_folder_or_a_tar(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor a tar"):
        ImageSource(tmp_path / "missing")
    (tmp_path / "a.txt").write_text("not a tar, only text")
    with pytest.raises(DataError, match=r"a\.txt"):
        ImageSource(tmp_path / "a.txt")


@settings(deadline=None)
@given(st.text() | st.sampled_from(["\0", "x" * 300, "\ud800", "a.jpg/b", "/", "."]))
def test_no_name_raises_anything_but_a_data_error(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    with pytest.raises(DataError):
        ImageSource(tmp_path_factory.getbasetemp()).read(name)
