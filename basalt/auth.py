"""Who may ask a service: `Authorization: Bearer KEY`, as OpenAI. On loopback alone no key is needed."""

import asyncio
import ipaddress

from fastapi import Request

from basalt.api_errors import APIError
from basalt.record.api_keys import find_key
from basalt.record.database import Sessions


class Guard:
    """A FastAPI dependency: lets a request pass, or answers it with 401 or 403.

    Args:
        scope: what the request must be allowed to do.
        host: the address the service listens on; on any but loopback every request needs a key.
        required: whether loopback needs one too.
    """

    def __init__(self, sessions: Sessions, scope: str, *, host: str, required: bool) -> None:
        self._sessions, self._scope = sessions, scope
        self._required = required or not is_loopback(host)

    async def __call__(self, request: Request) -> str:
        """The id of the key; empty where none is needed and none was given."""
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        given = secret.strip() if scheme.lower() == "bearer" else ""
        if not self._required:
            return ""
        if not given:
            raise _refused(401, "give an API key: Authorization: Bearer KEY (`basalt keys create` makes one)")
        key = await asyncio.to_thread(self._find, given)
        if key is None:
            raise _refused(401, "this API key is not known, or was revoked")
        key_id, scopes = key
        if self._scope not in scopes:
            raise _refused(403, f"this API key may not {self._scope}: its scopes are {', '.join(scopes) or 'none'}")
        return key_id

    def _find(self, secret: str) -> tuple[str, list[str]] | None:
        with self._sessions() as session:
            key = find_key(session, secret)
            return None if key is None else (key.id, key.scopes)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refused(status: int, message: str) -> APIError:
    return APIError(status, message, type="authentication_error", code="invalid_api_key")
