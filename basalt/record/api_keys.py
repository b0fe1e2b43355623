"""API keys: who may ask for what. Only a digest of a key is kept; the key itself is shown once, when it is made."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence

from sqlalchemy import JSON, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from basalt.record.clock import now
from basalt.record.database import Base

SCOPES = ("chat", "train", "evaluate")
LIMITS = ("requests_per_minute", "tokens_per_minute", "fetches_per_minute", "concurrent_requests")
PREFIX = "bsk-"


class NoSuchKey(Exception):
    """There is no key of this id."""


class ApiKey(Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]  # whose, or what for
    digest: Mapped[str] = mapped_column(unique=True)  # sha256 of the key: 256 random bits need no slower hash
    scopes: Mapped[list[str]] = mapped_column(JSON)
    limits: Mapped[dict[str, int]] = mapped_column(JSON, default=dict, server_default="{}")
    created_at: Mapped[float] = mapped_column(default=now())
    revoked_at: Mapped[float | None]


def create_key(
    session: Session, name: str, scopes: Sequence[str], limits: Mapping[str, int] | None = None
) -> tuple[ApiKey, str]:
    """A new key, and the secret itself.

    Args:
        limits: of its own, by the names in LIMITS; the service's hold where it has none.

    Raises:
        ValueError: an unknown scope or limit.
    """
    if strange := sorted(set(limits or {}) - set(LIMITS)):
        raise ValueError(f"unknown limit {strange[0]!r}: there are {', '.join(LIMITS)}")
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise ValueError(f"unknown scope {unknown[0]!r}: there are {', '.join(SCOPES)}")
    secret = PREFIX + secrets.token_urlsafe(32)
    key_id = f"key-{secrets.token_hex(8)}"
    key = ApiKey(id=key_id, name=name, digest=_digest(secret), scopes=list(scopes), limits=dict(limits or {}))
    session.add(key)
    session.flush()
    return key, secret


def find_key(session: Session, secret: str) -> ApiKey | None:
    """The key of a secret; None for one that is unknown or revoked."""
    return session.scalars(
        select(ApiKey).where(ApiKey.digest == _digest(secret), ApiKey.revoked_at.is_(None))
    ).one_or_none()


def list_keys(session: Session) -> list[ApiKey]:
    return list(session.scalars(select(ApiKey).order_by(ApiKey.created_at)))


def revoke_key(session: Session, key_id: str) -> None:
    """
    Raises:
        NoSuchKey: there is none of this id.
    """
    key = session.get(ApiKey, key_id)
    if key is None:
        raise NoSuchKey(f"there is no key {key_id!r}: `basalt keys list` shows them")
    key.revoked_at = key.revoked_at or now()  # type: ignore[assignment]


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
