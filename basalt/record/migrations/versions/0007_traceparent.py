"""The trace that a job is part of."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("traceparent", sa.String()))


def downgrade() -> None:
    op.drop_column("jobs", "traceparent")
