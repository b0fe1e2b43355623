"""What a request's `model` means: one version of one assistant exactly, so that all services serve the same.

`NAME` is the version that the alias `production` points to, or for its share of conversations the canary's; without
that alias what the vision service has in its own directory, else the only version in the registry. `NAME@ALIAS`,
`NAME@VERSION` and `NAME@` with the first digits of a version name one. A changed alias holds within `FRESH_SECONDS`.
"""

import json
import re
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from basalt import registry
from basalt.api_errors import APIError, bad_request, unavailable
from basalt.assistants import NAME
from basalt.breaker import Broken
from basalt.flights import SingleFlight
from basalt.object_store import ObjectStore, StoreUnavailable
from basalt.record.aliases import aliases_of
from basalt.record.canaries import get_canary
from basalt.record.reader import Reader
from services.gateway.vision_client import VisionClient

MAX_NAMES = 1000  # remembered: a client can ask for any
FRESH_SECONDS = 1.0  # that what was read of the state of record is taken as true
SLICES = 10_000  # of the traffic that a canary's share is counted in


@dataclass(frozen=True)
class Pointers:
    """Where an assistant's names point to: versions, sha256:…"""

    aliases: Mapping[str, str] = field(default_factory=dict)
    canary: str | None = None
    share: float = 0.0
    read_at: float = 0.0  # of the monotonic clock


class Assistants:
    """Names to versions. Where the state of record cannot be read, what it said last goes on being true."""

    def __init__(self, record: Reader, store: ObjectStore, vision: VisionClient) -> None:
        self._record = record
        self._store = store
        self._vision = vision
        self._pointers: dict[str, Pointers] = {}
        self._reading: SingleFlight[str, Pointers] = SingleFlight()

    async def resolve(self, model: str, body: Mapping[str, Any] | None = None) -> str:
        """NAME@HEX of what a request asks for; without a request, of what the name means but for a canary.

        Raises:
            APIError: 404 there is none; 503 it cannot be told now.
        """
        name, at, wanted = model.partition("@")
        if not re.fullmatch(NAME, name):
            raise await self._unknown(model)
        pointers = await self._current(name)
        if not at and body is not None and pointers.canary and _slice_of(body) < pointers.share * SLICES:
            return registry.written(name, pointers.canary)
        wanted = wanted if at else registry.PRODUCTION
        if wanted in pointers.aliases:
            return registry.written(name, pointers.aliases[wanted])
        if at and re.fullmatch(r"[0-9a-f]{64}", wanted):
            return model
        local = await self._vision.version(name)
        if local and (not at or (len(wanted) >= registry.SHORTEST and local.startswith(f"sha256:{wanted}"))):
            return registry.written(name, local)
        try:
            found = await registry.resolve(self._store, name, wanted if at else None, pointers.aliases)
        except registry.UnknownVersion as error:
            raise await self._unknown(model, str(error)) from None
        except StoreUnavailable as error:
            raise unavailable("object store") from error
        return registry.written(name, found)

    async def names(self) -> list[str]:
        """The assistants there are: those of the vision service's own directory, and the registry's.

        Raises:
            APIError: 503.
        """
        names = {each.name for each in await self._vision.assistants()}
        with suppress(StoreUnavailable):
            names |= set(await registry.names(self._store))
        return sorted(names)

    async def _current(self, name: str) -> Pointers:
        known = self._pointers.get(name)
        if known and time.monotonic() - known.read_at < FRESH_SECONDS:
            return known
        try:
            found = await self._reading.run(
                name, lambda: self._record.read(lambda session: _pointers(session, name), known=known)
            )
        except Broken as error:
            if known is None:
                raise unavailable("state of record") from error
            return known
        if name not in self._pointers and len(self._pointers) >= MAX_NAMES:
            self._pointers.pop(next(iter(self._pointers)))
        self._pointers[name] = found
        return found

    async def _unknown(self, model: str, why: str = "") -> APIError:
        known = ", ".join(await self.names()) or "none"
        return bad_request(
            f"there is no model {model[:100]!r}; there are: {known}{'; ' if why else ''}{why}",
            "model",
            "model_not_found",
            status=404,
        )


def _pointers(session: Session, name: str) -> Pointers:
    canary = get_canary(session, name)
    share = canary.share if canary else 0.0
    return Pointers(aliases_of(session, name), canary.version if canary else None, share, time.monotonic())


def _slice_of(body: Mapping[str, Any]) -> int:
    """The same for all turns of a conversation, and for one `user` where that is told."""
    messages = body.get("messages", [])
    first = next((i for i, message in enumerate(messages) if message.get("role") == "user"), 0)
    key = body.get("user") or messages[: first + 1]
    return zlib.crc32(json.dumps(key, ensure_ascii=False).encode()) % SLICES
