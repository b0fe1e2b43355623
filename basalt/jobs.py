"""`basalt jobs`: training jobs over the trainer's own HTTP API, with the `openai` client."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Training jobs: submit, watch, pause, resume, cancel.")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="the job's id, ftjob-…")]


@app.command()
def create(
    model: Annotated[str, typer.Option(help="what is trained: the name of one of the trainer's recipes")],
    data: Annotated[Path, typer.Option(help="the rows to learn from", exists=True, dir_okay=False)],
    images: Annotated[Path | None, typer.Option(help="a tar of the pictures they name", exists=True)] = None,
    held_out: Annotated[Path | None, typer.Option(help="rows whose loss is measured", exists=True)] = None,
    name: Annotated[str | None, typer.Option(help="the assistant's name")] = None,
    stage: Annotated[
        str | None, typer.Option(help="two_stage, stage1 or stage2; stage2 with --start, else two_stage")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="JOB|NAME[@VERSION|@ALIAS]", help="for stage2: the stage 1 job, or the assistant, to go on from"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE of the recipe, or stage1.FIELD=VALUE of one stage; may be given again"),
    ] = None,
    watch: Annotated[bool, typer.Option(help="show its events until it ends")] = False,
) -> None:
    """Uploads the data and submits a job."""
    stage = stage or ("two_stage" if start is None else "stage2")
    method = {"type": stage} | _wishes(("stage1", "stage2") if stage == "two_stage" else (stage,), set_ or [])
    with _client() as client:
        files = {
            argument: client.files.create(file=path, purpose="fine-tune").id
            for argument, path in (("training_file", data), ("images_file", images), ("validation_file", held_out))
            if path is not None
        }
        extra: dict[str, Any] = {key: value for key, value in (("suffix", name), ("start", start)) if value is not None}
        body = {"model": model, "method": method, **files, **extra}
        job = client.post("/fine_tuning/jobs", body=body, cast_to=dict)
        typer.echo(job["id"])
        if watch:
            _watch(client, job["id"])


@app.command("list")
def list_jobs() -> None:
    """The newest jobs."""
    with _client() as client:
        for job in client.fine_tuning.jobs.list(limit=20).data:
            typer.echo(f"{job.id}\t{job.status}\t{job.model}\t{job.fine_tuned_model or ''}")


@app.command()
def show(job: JobId) -> None:
    """One job, as JSON."""
    with _client() as client:
        typer.echo(client.fine_tuning.jobs.retrieve(job).model_dump_json(indent=2))


@app.command()
def events(job: JobId) -> None:
    """Its events, until it ends."""
    with _client() as client:
        _watch(client, job)


@app.command()
def pause(job: JobId) -> None:
    """Stops it within a step, with a checkpoint."""
    with _client() as client:
        typer.echo(client.fine_tuning.jobs.pause(job).status)


@app.command()
def resume(
    job: JobId,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="stage1.steps=N or stage2.steps=N: where it ends; longer or shorter"),
    ] = None,
) -> None:
    """Goes on from its checkpoint."""
    ends = {
        stage: asked for stage, asked in _wishes(("stage1", "stage2"), set_ or []).items() if asked["hyperparameters"]
    }
    with _client() as client:
        typer.echo(client.fine_tuning.jobs.resume(job, extra_body=ends or None).status)


@app.command()
def cancel(job: JobId) -> None:
    """Stops it for good."""
    with _client() as client:
        typer.echo(client.fine_tuning.jobs.cancel(job).status)


@contextmanager
def _client() -> Iterator[Any]:
    """Of the trainer at $BASALT_TRAINER_URL; what it refuses is one line on stderr."""
    import openai

    url = os.environ.get("BASALT_TRAINER_URL", "http://127.0.0.1:8090")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("BASALT_API_KEY", "none"))
    try:
        yield client
    except openai.APIConnectionError:
        typer.echo(f"basalt: no trainer answers at {url}: start it, or name it with BASALT_TRAINER_URL", err=True)
        raise typer.Exit(1) from None
    except openai.APIStatusError as error:
        told = error.body.get("message") if isinstance(error.body, dict) else error.message
        typer.echo(f"basalt: {told}", err=True)
        raise typer.Exit(1) from None


def _watch(client: Any, job: str) -> None:
    """Tells a job's events until it ends; exits with 1 unless it has succeeded."""
    import httpx

    url, key = f"{client.base_url}fine_tuning/jobs/{job}/events", {"Authorization": f"Bearer {client.api_key}"}
    asked, ended = {"stream": "true"}, False
    while not ended:
        client.fine_tuning.jobs.retrieve(job)  # or its refusal is told
        with suppress(httpx.TransportError), httpx.stream("GET", url, params=asked, timeout=None, headers=key) as live:
            for line in live.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    asked["after"] = event["id"]
                    typer.echo(event["message"])
                ended |= line == "data: [DONE]"
    if client.fine_tuning.jobs.retrieve(job).status != "succeeded":
        raise typer.Exit(1)


def _wishes(stages: tuple[str, ...], fields: list[str]) -> dict[str, Any]:
    """`steps=100` changes every stage's hyper-parameters, `stage1.steps=100` those of one. A value is read as JSON."""
    wishes: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for text in fields:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not FIELD=VALUE", param_hint="--set")
        one, dot, field = name.partition(".")
        if dot and one not in stages:
            raise typer.BadParameter(
                f"{name!r}: this job has {' and '.join(stages)}; give FIELD=VALUE, or {stages[0]}.FIELD=VALUE",
                param_hint="--set",
            )
        for stage in [one] if dot else stages:
            wishes[stage][field if dot else name] = _value(value)
    return {stage: {"hyperparameters": asked} for stage, asked in wishes.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
