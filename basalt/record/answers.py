"""Answers that models gave, each under the digest of all it depends on: what was asked once is not asked again.

Nothing here is ever changed. An answer that is in here outlives whoever asked for it.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import JSON, Text, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Mapped, Session, mapped_column

from basalt.record.clock import now
from basalt.record.database import Base


class Answer(Base):
    """What one model said to one request."""

    __tablename__ = "answers"

    key: Mapped[str] = mapped_column(primary_key=True)  # `key_of` the request
    request: Mapped[dict[str, Any]] = mapped_column(JSON)  # messages (with image ids), decoding, model, …
    text: Mapped[str] = mapped_column(Text)
    finish_reason: Mapped[str | None]
    prompt_tokens: Mapped[int | None]
    completion_tokens: Mapped[int | None]
    seconds: Mapped[float]  # from request to answer
    fingerprint: Mapped[str | None]  # that the server gave with this answer
    created_at: Mapped[float] = mapped_column(default=now())


def key_of(request: dict[str, Any]) -> str:
    """The digest of a request: sha256 of its JSON, whatever the order of its fields."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def find_answers(session: Session, keys: Iterable[str]) -> dict[str, Answer]:
    """The answers there are to these requests, by their keys."""
    return {answer.key: answer for answer in session.scalars(select(Answer).where(Answer.key.in_(set(keys))))}


def keep_answers(session: Session, answers: Iterable[Answer]) -> None:
    """Adds answers; where there is one already it stays."""
    columns = [column.key for column in inspect(Answer).columns if column.key != "created_at"]
    rows = [{column: getattr(answer, column) for column in columns} for answer in answers]
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    session.execute(dialect.insert(Answer).on_conflict_do_nothing(), rows)
