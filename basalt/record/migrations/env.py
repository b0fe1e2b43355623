"""Alembic's entry: runs migrations on the connection that `basalt.record.database.migrate` opened."""

from alembic import context
from sqlalchemy import text

from basalt.record.database import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    if connection.dialect.name == "postgresql":  # one process at a time
        connection.execute(text("SELECT pg_advisory_xact_lock(7214230)"))
    context.run_migrations()
