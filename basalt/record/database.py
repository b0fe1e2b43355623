"""The state of record: one SQL database (SQLite in the embedded default, PostgreSQL elsewhere), and its schema.

What a client was told was accepted is in here first. The schema is Alembic's, in `basalt/record/migrations`.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

MIGRATIONS = Path(__file__).parent / "migrations"
CONNECT_SECONDS = 5  # that a PostgreSQL server has to answer
BUSY_SECONDS = 30  # that a writer waits for another's transaction to end

Sessions = sessionmaker[Session]


class Base(DeclarativeBase):
    """All tables of the state of record."""


class RecordSettings(BaseSettings):
    """Where the state of record is; service settings inherit this."""

    model_config = SettingsConfigDict(extra="ignore")

    database: str = Field(default="sqlite:///var/basalt.db", validation_alias="BASALT_DATABASE")


def open_database(url: str) -> Sessions:
    """The database of an SQLAlchemy URL, its schema brought up to date: `with sessions.begin() as session: …`.

    Raises:
        ValueError: the URL is no SQLite or PostgreSQL URL, or the database cannot be used.
    """
    try:
        migrate(url)
    except (OSError, OperationalError) as error:
        why = str(error.orig if isinstance(error, OperationalError) else error).strip().splitlines()[0]
        raise ValueError(f"BASALT_DATABASE {make_url(url)} cannot be used: {why}") from error
    return sessionmaker(_engine(url), expire_on_commit=False)


def migrate(url: str) -> None:
    """Brings the schema up to date; of several processes that start at once, one does it and the others wait."""
    engine = _engine(url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with _alone(engine), engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql"):
        # The URL itself is not told: it may hold a password.
        raise ValueError("BASALT_DATABASE: give sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME")
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_SECONDS})
    Path(parsed.database or "").parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _sqlite_as_wanted)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _sqlite_as_wanted(connection: Any, _: object) -> None:
    """Readers beside a writer, foreign keys, durable commits; and transactions that begin as we say: taking the
    write lock at once, a read-then-write transaction waits its turn instead of failing half-way as "locked"."""
    connection.isolation_level = None  # Python's own module begins none
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        f"busy_timeout = {BUSY_SECONDS * 1000}",
    ):
        connection.execute(f"PRAGMA {pragma}")


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """PostgreSQL takes a lock of its own in the migration; for SQLite a file beside the database stands for one."""
    if engine.url.get_backend_name() != "sqlite" or not engine.url.database:
        yield
        return
    with Path(f"{engine.url.database}.migrating").open("w") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        yield
