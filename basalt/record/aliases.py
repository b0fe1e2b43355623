"""Aliases: mutable pointers to immutable versions (`production`, `candidate`), one set per assistant.

Every change is kept. The newest row of an alias says what it points to, and names the row that a rollback goes back
to; so rolling back twice goes back two promotions, and what was rolled back is still told.
"""

import re

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, mapped_column

from basalt.record.clock import now
from basalt.record.database import Base

_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LIKE_A_VERSION = re.compile(r"[0-9a-f]{6,}")


class AliasError(ValueError):
    """An alias cannot be changed as asked. The message says why and what would be right."""


class AliasChange(Base):
    """One change of one alias. Rows are only ever added."""

    __tablename__ = "alias_changes"

    name: Mapped[str] = mapped_column(primary_key=True)  # of the assistant
    alias: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  # 1, 2, …: two changes at once cannot both be the next
    version: Mapped[str]  # sha256:…
    before: Mapped[int | None]  # number of the change that a rollback goes back to
    rollback: Mapped[bool]
    created_at: Mapped[float] = mapped_column(default=now())


def get_alias(session: Session, name: str, alias: str) -> str | None:
    """The version that the alias points to, or None."""
    current = _current(session, name, alias)
    return current.version if current else None


def aliases_of(session: Session, name: str) -> dict[str, str]:
    """All aliases of an assistant, each with its version."""
    rows = session.scalars(select(AliasChange).where(AliasChange.name == name).order_by(AliasChange.number))
    return {row.alias: row.version for row in rows}


def alias_history(session: Session, name: str, alias: str) -> list[AliasChange]:
    """Every change of the alias, oldest first."""
    of_alias = (AliasChange.name == name, AliasChange.alias == alias)
    return list(session.scalars(select(AliasChange).where(*of_alias).order_by(AliasChange.number)))


def set_alias(session: Session, name: str, alias: str, version: str, *, expected: str | None) -> None:
    """Points the alias to a version. Pointing it to where it points already changes nothing.

    Args:
        expected: the version it points to so far; None where it is new.

    Raises:
        AliasError: it points elsewhere by now, or its name cannot be an alias.
    """
    if not _ALIAS.fullmatch(alias) or _LIKE_A_VERSION.fullmatch(alias):
        raise AliasError(
            f"{alias[:100]!r} cannot be an alias: use a-z, 0-9, '-' and '_', beginning with a letter, "
            "at most 63, and not what could be a version's digits"
        )
    current = _current(session, name, alias)
    found = current.version if current else None
    if found != expected:
        where = f"points to {found} by now" if found else "points nowhere"
        raise AliasError(f"{name}@{alias} {where}: look at it again, then decide")
    if found != version:
        _add(session, current, AliasChange(name=name, alias=alias, version=version, rollback=False))


def roll_back(session: Session, name: str, alias: str) -> str:
    """Points the alias back to what it was before its last promotion that still holds; returns that version.

    Raises:
        AliasError: there is no such alias, or it never pointed elsewhere.
    """
    current = _current(session, name, alias)
    if current is None:
        known = ", ".join(sorted(aliases_of(session, name))) or "none"
        raise AliasError(f"{name} has no alias {alias[:100]!r}; it has: {known}")
    target = session.get(AliasChange, (name, alias, current.before)) if current.before else None
    if target is None:
        raise AliasError(f"{name}@{alias} has nothing to go back to: {current.version} is what it first pointed to")
    back = AliasChange(name=name, alias=alias, version=target.version, before=target.before, rollback=True)
    _add(session, current, back)
    return target.version


def _current(session: Session, name: str, alias: str) -> AliasChange | None:
    of_alias = (AliasChange.name == name, AliasChange.alias == alias)
    return session.scalar(select(AliasChange).where(*of_alias).order_by(AliasChange.number.desc()).limit(1))


def _add(session: Session, current: AliasChange | None, change: AliasChange) -> None:
    """`change` as the next after `current`."""
    change.number = current.number + 1 if current else 1
    if not change.rollback:
        change.before = current.number if current else None
    try:
        with session.begin_nested():
            session.add(change)
    except IntegrityError:
        raise AliasError(f"{change.name}@{change.alias} was changed at the same time: look at it again") from None
