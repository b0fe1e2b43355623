"""`basalt store`: the object store itself."""

import asyncio
import time
from typing import Annotated

import typer

from basalt.object_store import IMAGES, StoreSettings, StoreUnavailable

app = typer.Typer(no_args_is_help=True, help="The object store: make it ready.")


@app.command()
def prepare(
    wait: Annotated[float, typer.Option(help="seconds that the server may take to answer")] = 60,
) -> None:
    """Makes the bucket that BASALT_STORE names, unless it is there, and writes to it once. Images go after
    BASALT_IMAGE_DAYS, where that is set."""
    settings = StoreSettings()
    deadline = time.monotonic() + wait
    try:
        while True:
            try:
                asyncio.run(settings.open_store().prepare())
                break
            except StoreUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        settings.check_store()
        asyncio.run(settings.open_store().expire(IMAGES, settings.image_days))
    except (StoreUnavailable, ValueError) as error:
        typer.echo(f"basalt: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{settings.store} is ready")


@app.callback()
def _() -> None:  # so that `prepare` stays a command of its own
    pass
