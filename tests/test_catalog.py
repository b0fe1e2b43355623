"""Versions in their directories, where several services look after the same ones."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from basalt.catalog import Catalog, reference
from basalt.object_store import DirectoryStore
from tests.tiny import make_assistant, make_tower

AT_ONCE, TIMES = 6, 25


@pytest.fixture
def models(tmp_path: Path) -> Path:
    make_assistant(tmp_path / "models", "one", make_tower(tmp_path / "tower"))
    return tmp_path / "models"


def test_services_that_start_together_do_not_take_each_other_s_version_away(models: Path, tmp_path: Path) -> None:
    """One deleted what it took to be damaged, which another had just put there."""
    versions = tmp_path / "versions"

    def start(_: int) -> str:
        found = Catalog(models, versions, DirectoryStore(tmp_path / "objects")).local["one"]
        assert found.directory.parent == versions
        return reference(found)

    with ThreadPoolExecutor(AT_ONCE) as services:
        for _ in range(TIMES):
            assert len(set(services.map(start, range(AT_ONCE)))) == 1
            shutil.rmtree(versions)


def test_a_damaged_version_is_replaced(models: Path, tmp_path: Path) -> None:
    first = Catalog(models, tmp_path / "versions", DirectoryStore(tmp_path / "objects")).local["one"]
    (first.directory / "manifest.json").unlink()
    second = Catalog(models, tmp_path / "versions", DirectoryStore(tmp_path / "objects")).local["one"]
    assert reference(second) == reference(first)
    assert (second.directory / "manifest.json").is_file()
    assert not [path for path in (tmp_path / "versions").iterdir() if path.name.startswith(".")]
