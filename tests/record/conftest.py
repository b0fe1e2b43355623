"""Databases of both kinds: an SQLite file, and a PostgreSQL server where one is installed."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of an empty database on a server of our own, reached by a socket in its directory."""
    tools = os.pathsep.join([os.environ["PATH"], *map(str, DEBIAN)])
    initdb, pg_ctl = (shutil.which(name, path=tools) for name in ("initdb", "pg_ctl"))
    if not initdb or not pg_ctl:
        pytest.skip("no PostgreSQL server is installed")
    pytest.importorskip("psycopg", reason="psycopg speaks with PostgreSQL")
    with tempfile.TemporaryDirectory() as directory:
        user = None
        if os.getuid() == 0:  # the server refuses to run as root
            user = "postgres"
            shutil.chown(directory, user)
        data, options = f"{directory}/data", f"-k {directory} -c listen_addresses="

        def run(*command: str) -> None:
            subprocess.run(command, check=True, user=user, cwd=directory, stdout=subprocess.DEVNULL)

        run(initdb, "--username=basalt", "--auth=trust", "--encoding=UTF8", data)
        run(pg_ctl, "start", "--wait", f"--pgdata={data}", f"--log={directory}/log", f"--options={options}")
        try:
            yield f"postgresql+psycopg://basalt@/postgres?host={directory}"
        finally:
            run(pg_ctl, "stop", "--mode=immediate", f"--pgdata={data}")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/var/basalt.db"
    server: str = request.getfixturevalue("postgres")
    with create_engine(server).begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    return server
