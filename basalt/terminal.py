"""What commands share: errors that were foreseen are one line on stderr, not a traceback."""

from collections.abc import Callable

import typer


def plainly(work: Callable[[], object]) -> None:
    """Runs a command."""
    from sqlalchemy.exc import SQLAlchemyError

    from basalt.object_store import StoreError

    try:
        work()
    except typer.Exit:  # itself a RuntimeError
        raise
    except SQLAlchemyError as error:
        _end(f"the state of record (BASALT_DATABASE): {getattr(error, 'orig', None) or error}")
    except (FileNotFoundError, RuntimeError, StoreError, ValueError) as error:
        _end(str(error))


def _end(message: str) -> None:
    typer.echo(f"basalt: {message}", err=True)
    raise typer.Exit(1) from None
