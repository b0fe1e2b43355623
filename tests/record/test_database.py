"""The schema and the way to it."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

import basalt.record.aliases
import basalt.record.answers
import basalt.record.api_keys
import basalt.record.canaries
import basalt.record.evals
import basalt.record.files
import basalt.record.jobs
import basalt.record.responses  # noqa: F401 (their tables)
from basalt.record.database import Base, migrate, open_database


def test_the_migrations_make_the_tables_the_code_speaks_of(url: str) -> None:
    migrate(url)
    with create_engine(url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_processes_that_start_at_once_migrate_once(url: str) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(migrate, [url] * 8))
    with open_database(url)() as session:
        assert session.execute(text("select count(*) from alembic_version")).scalar_one() == 1


def test_sqlite_writes_ahead(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/basalt.db")() as session:
        assert session.execute(text("pragma journal_mode")).scalar_one() == "wal"


@pytest.mark.parametrize("wrong", ["", "basalt.db", "mysql://user:hush@localhost/basalt"])
def test_what_is_no_database_is_refused_and_its_password_not_told(wrong: str) -> None:
    with pytest.raises(ValueError, match="give sqlite:///FILE or postgresql") as error:
        open_database(wrong)
    assert "hush" not in str(error.value)
