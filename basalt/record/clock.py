"""The database's own clock: leases are compared by one clock, whichever machine asks."""

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction


class now(GenericFunction[float]):
    """Seconds since 1970, with fractions, when the statement runs."""

    name = "basalt_now"
    identifier = "basalt_now"
    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql(*_: Any, **__: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"
