"""The registry: published versions of assistants, immutable, in the object store.

    versions/NAME/HEX/manifest.json    a version, addressed by the digest of its manifest's bytes
    parts/sha256/HEX                   a file that manifests name; once, however many versions share it

A manifest is written when all parts it names are there: what can be found is whole. Publishing the same version again
changes nothing, and whatever is read is checked against its digest.
"""

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from basalt.assistants import (
    MANIFEST,
    NAME,
    Assistant,
    AssistantError,
    Manifest,
    load_assistant,
    replacing,
    sha256,
)
from basalt.object_store import ObjectNotFound, ObjectStore

PRODUCTION = "production"  # the alias that an assistant's bare name means
SHORTEST = 6  # hex digits that may stand for a version, where no other begins with them


class UnknownVersion(AssistantError):
    """The registry has no such assistant or version; the message names those it has."""


class DamagedPart(AssistantError):
    """A part of a version is missing in the object store, or is not what its digest says."""


def written(name: str, version: str) -> str:
    """NAME@HEX of a version, sha256:…"""
    return f"{name}@{version.removeprefix('sha256:')}"


async def publish(store: ObjectStore, directory: Path) -> str:
    """Puts an assistant's directory into the registry; returns NAME@HEX.

    Raises:
        AssistantError: its files are missing, changed, or not all named by digest.
        StoreUnavailable: the object store is.
    """
    assistant = await asyncio.to_thread(load_assistant, directory)
    unnamed = [file for file in assistant.manifest.files if file not in assistant.manifest.digests]
    if unnamed:
        raise AssistantError(
            f"{directory / MANIFEST} is of an older kind and does not name {unnamed[0]} by digest: "
            "publish it anew from its run"
        )
    for relative, digest in assistant.manifest.digests.items():
        await store.put_file(_part_key(digest), assistant.path(relative))
    await store.put(_manifest_key(assistant.name, assistant.version), assistant.path(MANIFEST).read_bytes())
    return written(assistant.name, assistant.version)


async def names(store: ObjectStore) -> list[str]:
    """The assistants that have a version."""
    return sorted({key.split("/")[1] for key in await store.keys("versions")})


async def versions(store: ObjectStore, name: str) -> list[str]:
    """The versions of an assistant, sha256:… each; none where there is no such assistant."""
    if not re.fullmatch(NAME, name):
        return []
    return ["sha256:" + key.split("/")[2] for key in await store.keys(f"versions/{name}")]


async def resolve(store: ObjectStore, name: str, wanted: str | None, aliases: Mapping[str, str]) -> str:
    """What `NAME@wanted` means: a version's sha256:….

    Args:
        wanted: an alias, a version or its first hex digits; None for `production`, or the only version there is.
        aliases: the assistant's aliases, each with its version.

    Raises:
        UnknownVersion: nothing, or more than one version.
    """
    found = await versions(store, name)
    if not found:
        known = ", ".join(await names(store)) or "none; `basalt models publish` puts one there"
        raise UnknownVersion(f"the registry has no assistant {name[:100]!r}; it has: {known}")
    choice = f"it has {', '.join([*aliases, *found])}"
    if wanted is None:
        if PRODUCTION in aliases:
            return aliases[PRODUCTION]
        if len(found) > 1:
            raise UnknownVersion(f"{name} has several versions and no alias {PRODUCTION!r}: name one; {choice}")
        return found[0]
    if wanted in aliases:
        return aliases[wanted]
    digits = wanted.removeprefix("sha256:")
    fitting = [version for version in found if version.removeprefix("sha256:").startswith(digits)]
    if len(digits) < SHORTEST or not fitting:
        raise UnknownVersion(f"{name} has no version or alias {wanted[:100]!r}; {choice}")
    if len(fitting) > 1:
        raise UnknownVersion(f"{len(fitting)} versions of {name} begin with {digits}: give more digits; {choice}")
    return fitting[0]


async def read_manifest(store: ObjectStore, name: str, version: str) -> Manifest:
    """The manifest of a version, sha256:….

    Raises:
        UnknownVersion: there is none.
        DamagedPart: it is not of that digest, or no manifest that this Basalt understands.
        StoreUnavailable: the object store is.
    """
    return _parse(await _manifest_bytes(store, name, version), name, version)


async def check(store: ObjectStore, name: str, version: str) -> None:
    """Sees that a version, sha256:…, and all its parts are there, before anything is to point to it.

    Raises:
        UnknownVersion, DamagedPart: they are not.
        StoreUnavailable: the object store is.
    """
    for relative, digest in (await read_manifest(store, name, version)).digests.items():
        if not await store.exists(_part_key(digest)):
            raise _missing(name, version, relative, digest)


async def pull(store: ObjectStore, name: str, version: str, models: Path) -> Assistant:
    """Brings a version, sha256:…, into `models/NAME`, in the place of what was there.

    Raises:
        UnknownVersion: there is none.
        DamagedPart: what is stored is not it.
        AssistantError: `models/NAME` is there and no assistant.
        StoreUnavailable: the object store is.
    """
    raw = await _manifest_bytes(store, name, version)
    manifest = _parse(raw, name, version)
    with replacing(models / name) as directory:
        for relative, digest in manifest.digests.items():
            file = directory / relative
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                await store.get_file(_part_key(digest), file)
            except ObjectNotFound:
                raise _missing(name, version, relative, digest) from None
            file.chmod(0o644)
        (directory / MANIFEST).write_bytes(raw)
        try:
            await asyncio.to_thread(load_assistant, directory)
        except AssistantError as error:
            raise DamagedPart(f"{name}@{version} is damaged in the registry, publish it again: {error}") from error
    return load_assistant(models / name)


async def _manifest_bytes(store: ObjectStore, name: str, version: str) -> bytes:
    try:
        raw = await store.get(_manifest_key(name, version))
    except ObjectNotFound:
        raise UnknownVersion(f"the registry has no version {version} of {name!r}") from None
    if sha256(raw) != version:
        raise DamagedPart(f"the manifest of {name}@{version} is damaged in the registry: its digest is {sha256(raw)}")
    return raw


def _parse(raw: bytes, name: str, version: str) -> Manifest:
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise DamagedPart(f"the manifest of {name}@{version} is not one this Basalt understands: {error}") from error


def _missing(name: str, version: str, relative: str, digest: str) -> DamagedPart:
    return DamagedPart(
        f"{name}@{version} needs {relative}, and the registry has no part {digest}: publish the version again"
    )


def _manifest_key(name: str, version: str) -> str:
    return f"versions/{name}/{version.removeprefix('sha256:')}/{MANIFEST}"


def _part_key(digest: str) -> str:
    return f"parts/{digest.replace(':', '/')}"
