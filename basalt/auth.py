"""Who may ask a service: `Authorization: Bearer KEY`, as OpenAI. On loopback alone no key is needed."""

import ipaddress
import secrets
import time
from dataclasses import dataclass, field

from fastapi import Request
from sqlalchemy.orm import Session

from basalt.api_errors import APIError, unavailable
from basalt.breaker import Broken
from basalt.flights import SingleFlight
from basalt.record.api_keys import SCOPES, find_key
from basalt.record.reader import Reader

MAX_REMEMBERED = 10_000  # keys


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        id: of the API key; empty where none is needed.
        limits: that the key has of its own, by name.
    """

    id: str = ""
    scopes: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)


class Guard:
    """A FastAPI dependency: lets a request pass, or answers it with 401 or 403.

    Args:
        scope: what the request must be allowed to do.
        host: the address the service listens on.
        required: whether every request needs a key; by default on any address but loopback.
        own_key: that Basalt's own services use; it may do everything.
        fresh_seconds: that a key which was valid is taken as valid without asking again. Where the state of record
            cannot be read, it goes on being valid.
    """

    def __init__(
        self,
        record: Reader,
        scope: str,
        *,
        host: str,
        required: bool | None = None,
        own_key: str = "",
        fresh_seconds: float = 0,
    ) -> None:
        self._record, self._scope, self._fresh_seconds = record, scope, fresh_seconds
        self._own_key = own_key.encode()
        self._required = not is_loopback(host) if required is None else required
        self._valid: dict[str, tuple[Caller, float]] = {}  # by secret, and until when
        self._finding: SingleFlight[str, Caller | None] = SingleFlight()

    async def __call__(self, request: Request) -> Caller:
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        given = secret.strip() if scheme.lower() == "bearer" else ""
        if not self._required:
            return Caller()
        if not given:
            raise _refused(401, "give an API key: Authorization: Bearer KEY (`basalt keys create` makes one)")
        caller = await self._caller(given)
        if caller is None:
            raise _refused(401, "this API key is not known, or was revoked")
        if self._scope not in caller.scopes:
            scopes = ", ".join(caller.scopes) or "none"
            raise _refused(403, f"this API key may not {self._scope}: its scopes are {scopes}")
        return caller

    async def _caller(self, secret: str) -> Caller | None:
        if self._own_key and secrets.compare_digest(secret.encode(), self._own_key):
            return Caller("basalt", SCOPES)
        known, until = self._valid.get(secret, (None, 0.0))
        if known and time.monotonic() < until:
            return known
        try:
            found = await self._finding.run(
                secret, lambda: self._record.read(lambda session: _find(session, secret), known=known)
            )
        except Broken as error:
            if known is None:
                raise unavailable("state of record") from error
            found = known
        if found is None:
            self._valid.pop(secret, None)
        elif self._fresh_seconds:
            if len(self._valid) >= MAX_REMEMBERED:
                self._valid.clear()
            self._valid[secret] = (found, time.monotonic() + self._fresh_seconds)
        return found


def _find(session: Session, secret: str) -> Caller | None:
    key = find_key(session, secret)
    return None if key is None else Caller(key.id, tuple(key.scopes), key.limits)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refused(status: int, message: str) -> APIError:
    return APIError(status, message, type="authentication_error", code="invalid_api_key")
