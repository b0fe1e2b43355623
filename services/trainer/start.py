"""The versions a job has to do with: what one of stage 2 starts from, and what the name of a published one means."""

import asyncio
from contextlib import suppress
from pathlib import Path

from sqlalchemy.orm import Session

from basalt import registry
from basalt.api_errors import bad_request, unavailable
from basalt.assistants import Assistant, AssistantError, Manifest, load_assistants
from basalt.catalog import Catalog, UnknownAssistant
from basalt.object_store import ObjectStore, StoreUnavailable
from basalt.record.aliases import AliasError, aliases_of, set_alias


def is_job(start: str) -> bool:
    """Whether it is a job's id. An assistant may be named by one too: then `@` and its version follow."""
    return start.startswith("ftjob-") and "@" not in start


def find_version(wanted: str, session: Session, store: ObjectStore, models: Path) -> tuple[str, Manifest]:
    """NAME@HEX and the manifest of the version that is meant now, as the gateway takes it.

    Raises:
        APIError: 404 there is none, 400 it is damaged, 503 the object store cannot be asked.
    """
    name, at, version = wanted.partition("@")
    local: dict[str, Assistant] = {}
    try:
        local = load_assistants(models)
        found = _resolve(name, version if at else None, aliases_of(session, name), store, local.get(name))
        if name in local and local[name].version == found:
            manifest = local[name].manifest
        else:
            manifest = asyncio.run(registry.read_manifest(store, name, found))
    except registry.UnknownVersion as error:
        here = ", ".join(sorted(local)) or "none"
        message = f"'start' names no job and no assistant: {error}; the models directory has: {here}"
        raise bad_request(message, "start", "model_not_found", status=404) from None
    except AssistantError as error:
        raise bad_request(str(error), "start") from error
    except StoreUnavailable as error:
        raise unavailable("object store") from error
    return registry.written(name, found), manifest


def bring_version(reference: str, models: Path, versions: Path, store: ObjectStore) -> Assistant:
    """The files of NAME@HEX, in a directory of `versions` that never changes.

    Raises:
        APIError: 400 the version is gone since, or damaged.
        StoreUnavailable: it is not here, and the object store cannot be asked.
    """
    try:
        return asyncio.run(Catalog(models, versions, store).find(reference))
    except (UnknownAssistant, AssistantError) as error:
        raise bad_request(str(error), "start") from error


def settle_name(name: str, session: Session, store: ObjectStore, models: Path) -> str | None:
    """What a bare name means now, as NAME@HEX; None where it means nothing, or none of several versions.

    A name that means a version of the registry without an alias saying so, as its only one does, has it as its
    `production` from now on: the next version then changes nothing for those who ask for the name, until it is
    promoted.

    Raises:
        StoreUnavailable: the object store is.
    """
    aliases = aliases_of(session, name)
    try:
        local = load_assistants(models).get(name)
        meant = _resolve(name, None, aliases, store, local)
    except AssistantError:
        return None
    if local is None and registry.PRODUCTION not in aliases:
        with suppress(AliasError):  # somebody else was first
            set_alias(session, name, registry.PRODUCTION, meant, expected=None)
    return registry.written(name, meant)


def _resolve(
    name: str, wanted: str | None, aliases: dict[str, str], store: ObjectStore, local: Assistant | None
) -> str:
    """A version, sha256:…: what an alias says, then what the models directory has, then the registry."""
    alias = registry.PRODUCTION if wanted is None else wanted
    if alias in aliases:
        return aliases[alias]
    if local is not None and (
        wanted is None or (len(wanted) >= registry.SHORTEST and local.version.startswith(f"sha256:{wanted}"))
    ):
        return local.version
    return asyncio.run(registry.resolve(store, name, wanted, aliases))
