"""Canaries: a version that gets a share of the traffic which its assistant's bare name would send to `production`."""

from sqlalchemy import delete
from sqlalchemy.orm import Mapped, Session, mapped_column

from basalt.record.clock import now
from basalt.record.database import Base


class Canary(Base):
    """At most one of each assistant."""

    __tablename__ = "canaries"

    name: Mapped[str] = mapped_column(primary_key=True)  # of the assistant
    version: Mapped[str]  # sha256:…
    share: Mapped[float]  # of conversations, above 0 and at most 1
    created_at: Mapped[float] = mapped_column(default=now())


def get_canary(session: Session, name: str) -> Canary | None:
    return session.get(Canary, name)


def set_canary(session: Session, name: str, version: str, share: float) -> None:
    """Gives a version a share of the assistant's traffic, in the place of a canary that there was.

    Raises:
        ValueError: the share is none.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a canary's share is above 0 and at most 1, not {share:g}")
    end_canary(session, name)
    session.add(Canary(name=name, version=version, share=share))


def end_canary(session: Session, name: str) -> None:
    session.execute(delete(Canary).where(Canary.name == name))
