"""Versions go into the registry and come back as they were, or it is said what is wrong."""

import json
from pathlib import Path

import pytest

from basalt import registry
from basalt.assistants import AssistantError, Manifest, load_assistant, seal
from basalt.object_store import DirectoryStore
from tests.tiny import make_assistant

TOWER = Path("tower")  # named in manifests, never loaded


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "objects")


async def publish(store: DirectoryStore, root: Path, name: str, seed: int) -> str:
    """The version, sha256:…, of `name` with a projector of its own."""
    reference = await registry.publish(store, make_assistant(root / str(seed), name, TOWER, seed=seed))
    assert reference.startswith(f"{name}@")
    return "sha256:" + reference.removeprefix(f"{name}@")


async def test_what_is_published_is_pulled_the_same(store: DirectoryStore, tmp_path: Path) -> None:
    version = await publish(store, tmp_path, "cat", 1)
    pulled = await registry.pull(store, "cat", version, tmp_path / "models")
    assert pulled.version == version == load_assistant(tmp_path / "1" / "cat").version
    for file in (tmp_path / "1" / "cat").iterdir():
        assert (pulled.directory / file.name).read_bytes() == file.read_bytes()
    assert await registry.publish(store, pulled.directory) == f"cat@{version[7:]}"  # again: nothing changes
    assert await registry.versions(store, "cat") == [version]
    assert (await registry.read_manifest(store, "cat", version)) == pulled.manifest


async def test_a_pulled_version_takes_the_place_of_another(store: DirectoryStore, tmp_path: Path) -> None:
    first, second = [await publish(store, tmp_path, "cat", seed) for seed in (1, 2)]
    for version in (first, second, first):
        assert (await registry.pull(store, "cat", version, tmp_path / "models")).version == version
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["cat"]  # and leaves nothing else behind


async def test_a_file_that_versions_share_is_kept_once(store: DirectoryStore, tmp_path: Path) -> None:
    await publish(store, tmp_path, "cat", 1)
    await publish(store, tmp_path, "cat", 2)
    assert len(await store.keys("parts")) == 3  # two projectors, one chat template
    assert await registry.names(store) == ["cat"]
    assert await registry.names(DirectoryStore(tmp_path / "empty")) == []


async def test_what_a_name_means(store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(registry.UnknownVersion, match="no assistant 'cat'; it has: none"):
        await registry.resolve(store, "cat", None, {})
    first = await publish(store, tmp_path, "cat", 1)
    assert await registry.resolve(store, "cat", None, {}) == first  # the only one there is
    second = await publish(store, tmp_path, "cat", 2)
    with pytest.raises(registry.UnknownVersion, match="several versions and no alias 'production'"):
        await registry.resolve(store, "cat", None, {"candidate": second})
    aliases = {"production": second, "candidate": first}
    assert await registry.resolve(store, "cat", None, aliases) == second
    assert await registry.resolve(store, "cat", "candidate", aliases) == first
    for written in (first, first[7:], first[7:13]):
        assert await registry.resolve(store, "cat", written, aliases) == first
    for unknown in ("best", first[7:12], "sha256:" + "0" * 64, ""):
        with pytest.raises(registry.UnknownVersion, match="no version or alias"):
            await registry.resolve(store, "cat", unknown, aliases)
    with pytest.raises(registry.UnknownVersion, match=r"no assistant '\.\./cat'"):
        await registry.resolve(store, "../cat", None, {})


async def test_damage_is_told_and_publishing_again_mends_it(store: DirectoryStore, tmp_path: Path) -> None:
    version = await publish(store, tmp_path, "cat", 1)
    projector = load_assistant(tmp_path / "1" / "cat").manifest.projector.digest
    part = store.root / "parts" / projector.replace(":", "/")
    part.unlink()
    with pytest.raises(registry.DamagedPart, match=r"needs projector\.safetensors, and the registry has no part"):
        await registry.check(store, "cat", version)
    part.write_bytes(b"something else")
    with pytest.raises(registry.DamagedPart, match="is damaged in the registry"):
        await registry.pull(store, "cat", version, tmp_path / "models")
    assert not (tmp_path / "models" / "cat").exists()
    await registry.publish(store, tmp_path / "1" / "cat")
    await registry.check(store, "cat", version)
    manifest = store.root / "versions" / "cat" / version[7:] / "manifest.json"
    manifest.write_text(manifest.read_text().replace("resize", "pad"))
    with pytest.raises(registry.DamagedPart, match=r"the manifest of cat@sha256:.* is damaged"):
        await registry.read_manifest(store, "cat", version)


async def test_what_is_no_whole_version_is_not_published(store: DirectoryStore, tmp_path: Path) -> None:
    cat = make_assistant(tmp_path, "cat", TOWER)
    older = json.loads((cat / "manifest.json").read_text())
    del older["parts"]
    (cat / "manifest.json").write_text(json.dumps(older))
    with pytest.raises(AssistantError, match=r"does not name chat_template\.jinja by digest"):
        await registry.publish(store, cat)
    seal(cat, Manifest.model_validate(older))
    (cat / "chat_template.jinja").write_text("changed")
    with pytest.raises(AssistantError, match="has digest"):
        await registry.publish(store, cat)
    assert await store.keys("versions") == await store.keys("parts") == []
