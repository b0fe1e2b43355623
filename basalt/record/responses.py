"""Responses that clients may ask for again or go on from, each its asker's alone, until they expire.

Images are not in here: items name them by their ids.
"""

from typing import Any

from sqlalchemy import JSON, Index, delete, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from basalt.record.clock import now
from basalt.record.database import Base

DAY = 86_400.0  # seconds
MAX_TURNS = 1000  # of a conversation


class NoSuchResponse(Exception):
    """There is no response of this id."""


class KeptResponse(Base):
    __tablename__ = "responses"
    __table_args__ = (Index("responses_by_expiry", "expires_at"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]  # an API key's id; empty where none was needed
    previous_id: Mapped[str | None]  # which it goes on from
    body: Mapped[dict[str, Any]] = mapped_column(JSON)  # as it was told
    input: Mapped[list[dict[str, Any]]] = mapped_column(JSON)  # the items it answers, those of earlier turns apart
    expires_at: Mapped[float]


def keep_response(session: Session, response: KeptResponse, days: float) -> None:
    """Adds a response; those whose time is over go."""
    session.execute(delete(KeptResponse).where(KeptResponse.expires_at <= now()))
    response.expires_at = now() + days * DAY  # type: ignore[assignment]
    session.add(response)


def get_response(session: Session, response_id: str, owner: str) -> KeptResponse:
    """
    Raises:
        NoSuchResponse: the owner has none of this id, or it expired.
    """
    found = session.scalars(_valid(owner).where(KeptResponse.id == response_id)).one_or_none()
    if found is None:
        raise NoSuchResponse(
            f"there is no response {response_id[:100]!r}: it was not stored, was deleted, has expired or is another's"
        )
    return found


def conversation(session: Session, response_id: str, owner: str) -> list[KeptResponse]:
    """A response and all that it goes on from, the first one first.

    Raises:
        NoSuchResponse: it, or one that it goes on from, is no longer there.
    """
    newest = _valid(owner).where(KeptResponse.id == response_id)
    chain = newest.with_only_columns(KeptResponse.id, KeptResponse.previous_id).cte(recursive=True)
    before = _valid(owner).join(chain, KeptResponse.id == chain.c.previous_id)
    chain = chain.union(before.with_only_columns(KeptResponse.id, KeptResponse.previous_id))
    found = {each.id: each for each in session.scalars(select(KeptResponse).join(chain, KeptResponse.id == chain.c.id))}
    turns: list[KeptResponse] = []
    wanted: str | None = response_id
    while wanted is not None and len(turns) < MAX_TURNS:
        turns.append(found.get(wanted) or get_response(session, wanted, owner))
        wanted = turns[-1].previous_id
    return turns[::-1]


def keep_longer(session: Session, responses: list[KeptResponse], days: float) -> None:
    """A conversation is kept as long as the last that went on from it."""
    ids = [response.id for response in responses]
    session.execute(
        update(KeptResponse).where(KeptResponse.id.in_(ids)).values(expires_at=now() + days * DAY),
        execution_options={"synchronize_session": False},
    )


def delete_response(session: Session, response_id: str, owner: str) -> None:
    """
    Raises:
        NoSuchResponse: see `get_response`.
    """
    session.delete(get_response(session, response_id, owner))


def _valid(owner: str):
    return select(KeptResponse).where(KeptResponse.owner == owner, KeptResponse.expires_at > now())
