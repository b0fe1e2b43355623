"""`basalt keys`: API keys, in the state of record itself."""

from typing import Annotated

import typer

from basalt.record.api_keys import LIMITS, SCOPES, ApiKey, NoSuchKey, create_key, list_keys, revoke_key
from basalt.record.database import RecordSettings, Sessions, open_database

app = typer.Typer(no_args_is_help=True, help="API keys: make, list, revoke.")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="whose, or what for")],
    scope: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SCOPES)}; repeatable; all by default")] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help=f"NAME=NUMBER, of its own; repeatable. Names: {', '.join(LIMITS)}")
    ] = None,
) -> None:
    """Makes a key and shows it, once."""
    with _sessions().begin() as session:
        try:
            key, secret = create_key(session, name, scope or SCOPES, _limits(limit or []))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        typer.echo(f"{key.id}\t{secret}")


@app.command("list")
def list_all() -> None:
    """Every key, without the secrets."""
    with _sessions()() as session:
        for key in list_keys(session):
            typer.echo(f"{key.id}\t{key.name}\t{','.join(key.scopes)}\t{_told(key)}")


def _told(key: ApiKey) -> str:
    limits = " ".join(f"{name}={number}" for name, number in key.limits.items())
    return f"{'revoked' if key.revoked_at else 'valid'}\t{limits}".rstrip()


@app.command()
def revoke(key: Annotated[str, typer.Argument(help="its id, key-…")]) -> None:
    """Ends a key; the next request with it is refused."""
    with _sessions().begin() as session:
        try:
            revoke_key(session, key)
        except NoSuchKey as error:
            typer.echo(f"basalt: {error}", err=True)
            raise typer.Exit(1) from None


def _limits(given: list[str]) -> dict[str, int]:
    """
    Raises:
        ValueError: one is not NAME=NUMBER.
    """
    read = [(name, number) for name, _, number in (each.partition("=") for each in given)]
    if wrong := [f"{name}={number}" for name, number in read if not number.isdecimal()]:
        raise ValueError(f"{wrong[0]!r} is no limit: write NAME=NUMBER")
    return {name: int(number) for name, number in read}


def _sessions() -> Sessions:
    return open_database(RecordSettings().database)
