"""The schema and the way to it."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

import basalt.record.answers
import basalt.record.api_keys
import basalt.record.evals
import basalt.record.files
import basalt.record.jobs  # noqa: F401 (their tables)
from basalt.record.database import Base, migrate, open_database


def test_the_migrations_make_the_tables_the_code_speaks_of(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/basalt.db"
    migrate(url)
    with create_engine(url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_processes_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new/basalt.db"
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(migrate, [url] * 8))
    with open_database(url)() as session:
        assert session.execute(text("select count(*) from alembic_version")).scalar_one() == 1
        assert session.execute(text("pragma journal_mode")).scalar_one() == "wal"


@pytest.mark.parametrize("url", ["", "basalt.db", "mysql://localhost/basalt"])
def test_what_is_no_database_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="give sqlite:///FILE or postgresql"):
        open_database(url)
