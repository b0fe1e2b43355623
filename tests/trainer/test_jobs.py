"""Jobs as their users submit and watch them, and what becomes of them when things die."""

import json
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest
from typer.testing import CliRunner

from basalt.assistants import load_assistant
from basalt.cli import app
from basalt.model.assistant import LocalAssistant
from tests.collector import Collector
from tests.trainer.conftest import Trainer, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def submit(trainer: Trainer, rows: bytes, images: bytes, **hyperparameters: object) -> str:
    client = trainer.client()
    training = client.files.create(file=("rows.json", rows), purpose="fine-tune")
    pictures = client.files.create(file=("images.tar", images), purpose="fine-tune")
    stage = {"hyperparameters": hyperparameters}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training.id,
        suffix="shapes",
        method={"type": "two_stage", "stage1": stage, "stage2": stage},  # type: ignore[arg-type]
        extra_body={"images_file": pictures.id},
    )
    assert job.status == "queued"
    return job.id


def until(trainer: Trainer, job_id: str, *statuses: str, seconds: float = 200) -> object:
    client = trainer.client()
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
        assert time.monotonic() < deadline and job.status not in ("failed", "cancelled"), (job, trainer.log())
        time.sleep(0.2)
    return job


def test_a_job_trains_both_stages_and_publishes(
    trainer: Trainer, rows: bytes, images: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    client = trainer.client()
    job_id = submit(trainer, rows, images, steps=20)
    with httpx.stream("GET", f"{trainer.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true", timeout=200) as live:
        told = [json.loads(line[6:]) for line in live.iter_lines() if line.startswith("data: {")]
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", trainer.log()
    assert job.fine_tuned_model is not None and job.fine_tuned_model.startswith("shapes@")
    for name in ("BASALT_STORE", "BASALT_DATABASE"):
        monkeypatch.setenv(name, trainer.environment[name])
    pulled = CliRunner().invoke(app, ["models", "pull", job.fine_tuned_model, "--models", str(tmp_path)])
    assert pulled.exit_code == 0, pulled.output
    local = LocalAssistant(load_assistant(tmp_path / "shapes"), trainer.directory / "tiny-lm")
    assert local.answer([([{"role": "user", "content": "Hello!"}], [])], max_new_tokens=2)
    assert job.trained_tokens and job.finished_at
    said = [event["message"] for event in told if event["type"] == "message"]
    assert any(each.startswith("rows.json: ") and each.endswith("none dropped") for each in said)
    assert said.index("stage1: reading its data") < said.index("stage2: reading its data")
    seen, *measured = [event["data"] for event in told if event["type"] == "metrics"]
    assert (seen["phase"], seen["step"]) == ("stage1 features", seen["steps"])
    assert [(each["phase"], each["step"]) for each in measured][-1] == ("stage2", 20)
    assert measured[-1]["train_loss"] < measured[0]["train_loss"]
    listed = list(client.fine_tuning.jobs.list_events(job_id, limit=3))
    assert [event.message for event in reversed(listed)] == [event["message"] for event in told]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job_id))
    assert {checkpoint.step_number for checkpoint in checkpoints} >= {20}
    files = [client.files.retrieve(name) for name in job.result_files]
    assert [file.filename for file in files] == ["step_metrics.csv", "training.log"]
    assert client.files.content(files[0].id).text.startswith("phase,step,loss")
    collector.wait_for(lambda: any(span.name == "training" for span in collector.spans), 20)
    (attempt,) = [span for span in collector.spans if span.name == "training"]
    (submitted,) = [span for span in collector.spans if span.id == attempt.parent]
    assert (submitted.service, submitted.name) == ("basalt-trainer", "POST /v1/fine_tuning/jobs")
    below = [span.name for span in collector.of_trace(attempt.trace) if span.parent == attempt.id]
    assert attempt.attributes["job"] == job_id and below == ["prepare", "train", "publish"]
    assert 'basalt_jobs{kind="training",status="succeeded"} 1.0' in httpx.get(f"{trainer.url}/metrics").text


def test_stage_2_goes_on_from_another_job_where_the_projector_fits(
    trainer: Trainer, rows: bytes, images: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = trainer.client()

    def stage(name: str, model: str, **ours: object) -> str:
        method = {"type": name, name: {"hyperparameters": {"steps": 5}}}
        training = client.files.create(file=("rows.json", rows), purpose="fine-tune").id
        pictures = client.files.create(file=("images.tar", images), purpose="fine-tune").id
        return client.fine_tuning.jobs.create(
            model=model,
            training_file=training,
            method=method,  # type: ignore[arg-type]
            extra_body={"images_file": pictures, **ours},
        ).id

    first = stage("stage1", "tiny")
    until(trainer, first, "succeeded")
    widths = "2532 → 48 → 64 .tower → hidden → base LM., but 'wide' needs 2532 → 48 → 128: start from a stage 1 job of"
    with pytest.raises(openai.BadRequestError, match=widths):
        stage("stage2", "wide", start=first)
    with pytest.raises(openai.NotFoundError, match="there is no job 'ftjob-0'"):
        stage("stage2", "tiny", start="ftjob-0")
    second = stage("stage2", "tiny", start=first)
    until(trainer, second, "succeeded")
    for name in ("BASALT_STORE", "BASALT_DATABASE"):
        monkeypatch.setenv(name, trainer.environment[name])
    shown = CliRunner().invoke(app, ["models", "show", str(client.fine_tuning.jobs.retrieve(second).fine_tuned_model)])
    lineage = json.loads(shown.stdout)["manifest"]["lineage"]
    assert lineage["job"] == second
    assert lineage["parent"] == client.fine_tuning.jobs.retrieve(first).fine_tuned_model
    assert lineage["request"]["start"] == first


def test_stage_2_goes_on_from_a_published_assistant(
    trainer: Trainer, rows: bytes, images: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = trainer.client()
    training = client.files.create(file=("rows.json", rows), purpose="fine-tune").id
    pictures = client.files.create(file=("images.tar", images), purpose="fine-tune").id

    def job(kind: str, *, model: str = "tiny", name: str = "grown", start: str | None = None, **fields: object) -> str:
        stage = {"hyperparameters": {"steps": 5, **fields}}
        return client.fine_tuning.jobs.create(
            model=model,
            training_file=training,
            suffix=name,
            method={"type": kind, "stage1": stage, "stage2": stage},  # type: ignore[arg-type]
            extra_body={"images_file": pictures, "start": start},
        ).id

    first = job("two_stage")
    until(trainer, first, "succeeded")
    parent = str(client.fine_tuning.jobs.retrieve(first).fine_tuned_model)
    with pytest.raises(
        openai.NotFoundError, match=r"no assistant 'unheard-of'.* the models directory has: basalt-tiny"
    ):
        job("stage2", start="unheard-of")
    with pytest.raises(openai.NotFoundError, match="grown has no version or alias 'candidate'"):
        job("stage2", start="grown@candidate")
    with pytest.raises(openai.BadRequestError, match=r"tower\.image_size is 256 there and 64 in the recipe") as refused:
        job("stage2", start="basalt-tiny")
    assert refused.value.code == "projector_does_not_fit"
    with pytest.raises(openai.BadRequestError, match="width of the base LM is 64 there and 128 in the recipe"):
        job("stage2", start=parent, model="wide")
    with pytest.raises(openai.BadRequestError, match=r"lora\.rank is 4 there and 8 in the recipe") as refused:
        job("stage2", start=parent[: len("grown@") + 6], lora={"rank": 8})
    assert refused.value.code == "lora_does_not_fit"
    for kind, start in (("two_stage", parent), ("stage2", None)):
        with pytest.raises(openai.BadRequestError, match="'start' belongs to a method of type 'stage2'"):
            job(kind, start=start)
    with pytest.raises(openai.BadRequestError, match="keep_start is the share of an assistant's projector and LoRA"):
        job("two_stage", keep_start=0.5)
    second = job("stage2", start="grown", keep_start=0.5)
    until(trainer, second, "succeeded")
    for name in ("BASALT_STORE", "BASALT_DATABASE"):
        monkeypatch.setenv(name, trainer.environment[name])
    further = str(client.fine_tuning.jobs.retrieve(second).fine_tuned_model)
    shown = CliRunner().invoke(app, ["models", "show", further])
    lineage = json.loads(shown.stdout)["manifest"]["lineage"]
    assert lineage["parent"] == lineage["request"]["start"] == parent
    # Who asks for the name goes on getting the first version, until the second is promoted.
    last = [client.fine_tuning.jobs.list_events(job_id, limit=1).data[0].message for job_id in (first, second)]
    assert last[0] == f"Published {parent}; 'grown' means it"
    still = f"'grown' still means {parent}: `basalt models promote {further}` changes that"
    assert last[1] == f"Published {further}; {still}"
    meant = json.loads(CliRunner().invoke(app, ["models", "show", "grown"]).stdout)
    assert (meant["version"], meant["aliases"]) == (parent, ["production"])


def test_a_job_is_paused_and_resumed(trainer: Trainer, rows: bytes, images: bytes) -> None:
    client = trainer.client()
    job_id = submit(trainer, rows, images, steps=3000)
    until(trainer, job_id, "running")
    wait(lambda: list(client.fine_tuning.jobs.checkpoints.list(job_id)), 100)
    client.fine_tuning.jobs.pause(job_id)
    until(trainer, job_id, "paused")
    assert not trainer.training()
    step = max(each.step_number for each in client.fine_tuning.jobs.checkpoints.list(job_id))

    def resume_to(stage: str, steps: int) -> None:
        client.fine_tuning.jobs.resume(job_id, extra_body={stage: {"hyperparameters": {"steps": steps}}})

    with pytest.raises(openai.BadRequestError, match=f"stage1 is at step {step}"):
        resume_to("stage1", step)
    resume_to("stage1", step + 10)
    with pytest.raises(openai.ConflictError, match="can be changed while it is paused"):
        resume_to("stage1", 3000)
    until(trainer, job_id, "running")
    wait(lambda: max(each.step_number for each in client.fine_tuning.jobs.checkpoints.list(job_id)) > step, 100)
    said = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
    assert f"stage1: going on from step {step} of {step + 10}" in said
    wait(lambda: "stage2" in str(client.fine_tuning.jobs.retrieve(job_id).model_dump()["progress"]["phase"]), 100)
    client.fine_tuning.jobs.pause(job_id)
    until(trainer, job_id, "paused")
    with pytest.raises(openai.BadRequestError, match=r"stage1 of job .* is done"):
        resume_to("stage1", 3000)
    client.fine_tuning.jobs.cancel(job_id)
    until(trainer, job_id, "cancelled")
    told = [event.data for event in client.fine_tuning.jobs.list_events(job_id, limit=100) if event.type == "metrics"]
    steps = [(data["phase"], data["step"]) for data in told]  # type: ignore[index]
    assert len(steps) == len(set(steps))  # each is told once
    with pytest.raises(openai.ConflictError, match="has cancelled"):
        client.fine_tuning.jobs.resume(job_id)


def test_a_worker_s_death_is_noticed_and_the_job_goes_on(trainer: Trainer, rows: bytes, images: bytes) -> None:
    client = trainer.client()
    job_id = submit(trainer, rows, images, steps=3000)
    wait(lambda: list(client.fine_tuning.jobs.checkpoints.list(job_id)), 150)
    died = time.monotonic()
    trainer.stop("worker", signal.SIGKILL)
    wait(lambda: not trainer.training(), 20)  # nothing trains without its worker
    trainer.stop("redis", signal.SIGKILL)  # and everything that was in it is gone
    trainer.start("redis")
    trainer.start("worker")
    wait(lambda: trainer.training(), 60)
    assert time.monotonic() - died < 60
    assert len(trainer.training()) == 1
    client.fine_tuning.jobs.cancel(job_id)
    until(trainer, job_id, "cancelled")


def test_a_stopped_worker_hands_its_job_on(trainer: Trainer, rows: bytes, images: bytes) -> None:
    client = trainer.client()
    job_id = submit(trainer, rows, images, steps=3000)
    wait(lambda: list(client.fine_tuning.jobs.checkpoints.list(job_id)), 150)
    trainer.stop("worker", signal.SIGTERM)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "queued"
    trainer.start("worker")
    until(trainer, job_id, "running")
    client.fine_tuning.jobs.cancel(job_id)
    until(trainer, job_id, "cancelled")


def test_the_object_store_and_redis_may_be_gone_for_a_while(trainer: Trainer, rows: bytes, images: bytes) -> None:
    client = trainer.client()
    job_id = submit(trainer, rows, images, steps=3000)
    kept = lambda: list(client.fine_tuning.jobs.checkpoints.list(job_id))  # noqa: E731
    wait(kept, 150)
    store = trainer.directory / "objects"
    store.rename(store.with_name("away"))
    store.write_bytes(b"")  # no directory: nothing can be written
    trainer.stop("redis", signal.SIGKILL)
    time.sleep(10)
    before = max(each.step_number for each in kept())
    [process] = trainer.training()
    store.unlink()
    store.with_name("away").rename(store)
    trainer.start("redis")
    wait(lambda: max(each.step_number for each in kept()) > before, 60)
    assert trainer.training() == [process]  # it went on all the while
    client.fine_tuning.jobs.cancel(job_id)
    until(trainer, job_id, "cancelled")


def test_what_cannot_be_is_refused_at_once(trainer: Trainer, rows: bytes) -> None:
    client = trainer.client()
    with pytest.raises(openai.BadRequestError, match="one of tiny"):
        client.fine_tuning.jobs.create(model="gpt-4o", training_file="file-1")
    with pytest.raises(openai.NotFoundError, match="upload it to /v1/files first"):
        client.fine_tuning.jobs.create(model="tiny", training_file="file-1")
    training = client.files.create(file=("rows.json", rows), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="learning_rate: Input should be greater than 0"):
        client.fine_tuning.jobs.create(
            model="tiny",
            training_file=training.id,
            method={"type": "two_stage", "stage1": {"hyperparameters": {"projector_learning_rate": -1}}},  # type: ignore
        )
    with pytest.raises(openai.BadRequestError, match="base_lm' is not a hyper-parameter"):
        client.fine_tuning.jobs.create(
            model="tiny",
            training_file=training.id,
            method={"type": "two_stage", "stage1": {"hyperparameters": {"base_lm": "/"}}},  # type: ignore
        )
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-1")


def test_data_that_is_not_what_it_says_fails_with_the_reason(trainer: Trainer, images: bytes) -> None:
    job_id = submit(trainer, b'{"not": "a list"}', images)
    client = trainer.client()
    wait(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "failed", 120)
    error = client.fine_tuning.jobs.retrieve(job_id).error
    assert error is not None and "is not a JSON list of rows" in error.message


def test_the_command_line_submits_and_watches(
    trainer: Trainer, rows: bytes, images: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.json").write_bytes(rows)
    (tmp_path / "images.tar").write_bytes(images)
    monkeypatch.setenv("BASALT_TRAINER_URL", trainer.url)
    arguments = ["--model", "tiny", "--data", str(tmp_path / "rows.json"), "--images", str(tmp_path / "images.tar")]
    done = CliRunner().invoke(app, ["jobs", "create", *arguments, "--stage", "stage1", "--set", "steps=5", "--watch"])
    assert done.exit_code == 0, done.output
    job_id, *told = done.output.splitlines()
    assert told[0] == "Created"
    assert told[-1].startswith(f"Published {job_id}@")
    assert f"{job_id}\tsucceeded\ttiny" in CliRunner().invoke(app, ["jobs", "list"]).output
    both = CliRunner().invoke(app, ["jobs", "create", *arguments, "--set", "steps=9", "--set", "stage1.steps=3"])
    method = trainer.client().fine_tuning.jobs.retrieve(both.output.strip()).model_dump()["method"]
    assert [method[stage]["hyperparameters"]["steps"] for stage in ("stage1", "stage2")] == [3, 9]
    assert CliRunner().invoke(app, ["jobs", "cancel", both.output.strip()]).exit_code == 0
    elsewhere = CliRunner().invoke(app, ["jobs", "create", *arguments, "--stage", "stage1", "--set", "stage2.steps=3"])
    assert elsewhere.exit_code == 2 and "stage1.FIELD=VALUE" in elsewhere.output
    refused = CliRunner().invoke(app, ["jobs", "resume", job_id])
    assert refused.exit_code == 1
    assert "has succeeded: it can no longer be changed" in refused.output
    monkeypatch.setenv("BASALT_TRAINER_URL", "http://127.0.0.1:9")
    assert "no trainer answers at http://127.0.0.1:9" in CliRunner().invoke(app, ["jobs", "list"]).output
