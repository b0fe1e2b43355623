"""As an operator would: everything in containers, asked, trained, killed, restarted."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest

from tests.deploy.engine import FILES, ROOT, Containers, missing, wait
from tests.stack.browser import CHROMIUM, ask, attach, chat_page
from tests.stack.test_evals import tar
from tests.stack.test_stack import data_url, picture, question, shape, sign

reason = missing()
pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(reason is not None, reason=reason or ""),
]

MODEL = "basalt-tiny"
DEFAULT_PORTS = {
    "BASALT_GATEWAY_PORT": "8080",
    "BASALT_UI_PORT": "8501",
    "BASALT_TRAINER_PORT": "8090",
    "BASALT_EVALUATOR_PORT": "8091",
}
LONG_RUNNING = ["gateway", "vision", "llm", "ui", "trainer", "worker", "evaluator", "eval-worker"]
LONG_RUNNING += ["redis", "postgres", "minio"]


@pytest.fixture(scope="session")
def basalt() -> Iterator[Containers]:
    if running := os.environ.get("BASALT_TEST_PROJECT"):  # one that is up already, with the APIs published
        yield Containers(running, DEFAULT_PORTS)
        return
    containers = Containers.new("basalt-test")
    try:
        containers.compose("build", seconds=6000)
        containers.compose("up", "--wait", "--wait-timeout", "900", seconds=1000)
        yield containers
    finally:
        containers.compose("down", "--volumes", "--timeout", "20", check=False)


@pytest.fixture(scope="session")
def trainer(basalt: Containers) -> openai.OpenAI:
    made = basalt.compose("exec", "-T", "trainer", "python", "-m", "basalt.cli", "keys", "create", "tests")
    key = made.split()[-1]
    return openai.OpenAI(base_url=f"{basalt.url('trainer')}/v1", api_key=key, max_retries=3, timeout=120)


def answer(basalt: Containers, colour: str = "red", model: str = MODEL) -> str:
    messages = [question(picture(data_url(shape(colour))), "Describe the image.")]
    reply = basalt.ask().chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)  # type: ignore[arg-type]
    return reply.choices[0].message.content or ""


def answers(basalt: Containers) -> bool:
    try:
        return "circle" in answer(basalt, "green").lower()
    except openai.InternalServerError:
        return False


def submit(client: openai.OpenAI, *, steps: int) -> str:
    """A training job on six drawn pictures."""
    colours = ["red", "green", "blue", "orange", "purple", "black"]
    archive = tar({f"{colour}.png": shape(colour) for colour in colours})
    rows = [
        {
            "id": colour,
            "image": f"{colour}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe the image."},
                {"from": "gpt", "value": f"A {colour} circle."},
            ],
        }
        for colour in colours
    ]
    training = client.files.create(file=("rows.json", json.dumps(rows).encode()), purpose="fine-tune").id
    images = client.files.create(file=("images.tar", archive), purpose="fine-tune").id
    wishes = {"hyperparameters": {"steps": steps, "checkpoint_every": 5}}
    body = {
        "model": MODEL,
        "training_file": training,
        "images_file": images,
        "suffix": "circles",
        "method": {"type": "two_stage", "stage1": wishes, "stage2": wishes},
    }
    return client.post("/fine_tuning/jobs", body=body, cast_to=dict)["id"]  # type: ignore[return-value, index]


def test_the_gateway_is_small(basalt: Containers) -> None:
    image = basalt.inspect("gateway", "{{.Config.Image}}")
    size = subprocess.run(["docker", "image", "inspect", "-f", "{{.Size}}", image], capture_output=True, text=True)
    assert int(size.stdout) <= 250e6


@pytest.mark.parametrize("service", ["gateway", "vision", "llm", "ui", "trainer", "worker"])
def test_ours_are_not_root_and_have_no_compiler(basalt: Containers, service: str) -> None:
    script = "import os, shutil; print(os.getuid(), [c for c in ('gcc', 'cc', 'g++', 'clang') if shutil.which(c)])"
    assert basalt.compose("exec", "-T", service, "python", "-c", script).split(maxsplit=1) == ["10001", "[]\n"]
    writes = "open('/app/written', 'w')"
    refused = basalt.compose("exec", "-T", service, "python", "-c", f"\ntry: {writes}\nexcept OSError: print('no')")
    assert refused.strip() == "no"


def test_chat_with_an_image(basalt: Containers) -> None:
    assert "circle" in answer(basalt).lower()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page(basalt: Containers, tmp_path: Path) -> None:
    photo = tmp_path / "sign.png"
    photo.write_bytes(sign())
    with chat_page(basalt.url("ui")) as page:
        attach(page, photo)
        assert ask(page, "What does it say?").strip()


def test_a_job_survives_its_worker_and_its_version_is_stored(basalt: Containers, trainer: openai.OpenAI) -> None:
    job = submit(trainer, steps=12)
    wait(lambda: trainer.fine_tuning.jobs.checkpoints.list(job).data, 900, "a checkpoint")
    basalt.kill("worker")
    wait(lambda: trainer.fine_tuning.jobs.retrieve(job).status in ("succeeded", "failed"), 1800, "the job's end")
    done = trainer.fine_tuning.jobs.retrieve(job)
    assert done.status == "succeeded", done.error
    told = [event.message for event in trainer.fine_tuning.jobs.list_events(job, limit=100).data]
    assert sum(message.startswith("Training on") for message in told) == 2, told  # and went on where it was
    assert sum("stage1: step 5 " in message for message in told) == 1, told
    assert done.fine_tuned_model
    assert answer(basalt, model=done.fine_tuned_model)  # it is served at once, beside the one it was made from
    assert "circle" in answer(basalt).lower()


def test_an_evaluation(basalt: Containers, trainer: openai.OpenAI) -> None:
    rows = [{"id": "shape", "image": "red.png", "question": "What colour is the shape?", "answers": ["red"]}]
    data = trainer.files.create(file=("questions.json", json.dumps(rows).encode()), purpose="evals")
    images = trainer.files.create(file=("images.tar", tar({"red.png": shape("red")})), purpose="evals")
    source = {"type": "benchmark", "benchmark": "vqa", "data": data.id, "images": images.id}
    request = {"data_source_config": source, "run": {"data_source": {"type": "completions", "model": MODEL}}}
    headers = {"Authorization": f"Bearer {trainer.api_key}"}
    with httpx.Client(base_url=basalt.url("evaluator"), headers=headers, trust_env=False, timeout=60) as evaluator:
        made = evaluator.post("/v1/evals", json=request).raise_for_status().json()
        run = f"/v1/evals/{made['id']}/runs/{made['run']['id']}"
        wait(lambda: evaluator.get(run).json()["status"] in ("completed", "failed"), 300, "the evaluation's end")
        told = evaluator.get(run).json()
        assert told["status"] == "completed" and told["result_counts"]["errored"] == 0, told
        assert "vqa" in evaluator.get(f"{run}/files/report.md").raise_for_status().text.lower()


@pytest.mark.parametrize("service", LONG_RUNNING)
def test_each_comes_back(basalt: Containers, service: str) -> None:
    before = int(basalt.inspect(service, "{{.RestartCount}}"))
    basalt.kill(service)
    wait(lambda: int(basalt.inspect(service, "{{.RestartCount}}")) > before, 60, f"{service} is started again")
    wait(lambda: basalt.healthy(service), 600, f"{service} is healthy")
    wait(basalt.ready, 300, "the gateway is ready")
    wait(lambda: answers(basalt), 120, "an answer")  # the store tells nobody that it is ready


@pytest.mark.skipif("BASALT_TEST_RESTART_ENGINE" not in os.environ, reason="it names the command that does so")
def test_all_come_back_with_the_engine(basalt: Containers, trainer: openai.OpenAI) -> None:
    job = submit(trainer, steps=40)
    wait(lambda: trainer.fine_tuning.jobs.checkpoints.list(job).data, 900, "a checkpoint")
    subprocess.run(os.environ["BASALT_TEST_RESTART_ENGINE"], shell=True, check=True, timeout=300)
    wait(basalt.ready, 600, "the gateway is ready")
    for service in LONG_RUNNING:
        wait(partial(basalt.healthy, service), 300, f"{service} is healthy")
    assert "circle" in answer(basalt, "green").lower()
    wait(lambda: trainer.fine_tuning.jobs.retrieve(job).status in ("succeeded", "failed"), 1800, "the job's end")
    told = [event.message for event in trainer.fine_tuning.jobs.list_events(job, limit=100).data]
    assert trainer.fine_tuning.jobs.retrieve(job).status == "succeeded", told
    assert sum("stage1: step 5 " in message for message in told) == 1, told  # it went on where it was


def test_a_stopped_gateway_finishes_what_it_began(basalt: Containers) -> None:
    """SIGTERM drains: an answer that streams while the service is told to stop comes to its end."""
    request = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 100}
    stream = basalt.ask().chat.completions.create(**request, stream=True, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
    pieces = iter(stream)
    next(pieces)
    stopping = threading.Thread(target=basalt.compose, args=("stop", "gateway"))
    stopping.start()
    rest = list(pieces)
    stopping.join()
    assert rest[-1].choices[0].finish_reason == "length"
    assert basalt.inspect("gateway", "{{.State.ExitCode}}") in ("0", "143")
    basalt.compose("up", "-d", "--wait", "gateway")


@contextmanager
def load(basalt: Containers) -> Iterator[None]:
    """Two clients without pause; none of their requests may fail."""
    failures: list[str] = []
    answered = 0
    over = threading.Event()

    def ask() -> None:
        nonlocal answered
        while not over.is_set():
            try:
                answer(basalt)
                answered += 1
            except openai.OpenAIError as error:
                failures.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not failures and answered > 10


def test_a_rolling_restart_fails_no_request(basalt: Containers) -> None:
    replicas = (*FILES, "deploy/compose/replicas.yml")
    basalt.compose("up", "-d", "--wait", files=replicas)
    wait(basalt.ready, 300, "the gateway is ready")
    with load(basalt):
        for service in ("vision", "gateway"):
            for container in basalt.compose("ps", "-q", service).split():
                time.sleep(10)
                subprocess.run(["docker", "restart", "-t", "30", container], check=True, capture_output=True)
                health = ["docker", "inspect", "-f", "{{.State.Health.Status}}", container]
                wait(lambda: subprocess.run(health, capture_output=True).stdout.strip() == b"healthy", 300, "healthy")  # noqa: B023
        time.sleep(10)
    basalt.compose("rm", "--stop", "--force", "balancer", files=replicas)
    basalt.compose("up", "-d", "--wait")


def test_prometheus_sees_every_service(basalt: Containers) -> None:
    basalt.compose("--profile", "observability", "up", "-d", "prometheus")
    script = "import urllib.request as r; print(r.urlopen('http://prometheus:9090/api/v1/targets').read().decode())"

    def down() -> list[str]:
        told = basalt.compose("exec", "-T", "gateway", "python", "-c", script, check=False)
        targets = json.loads(told)["data"]["activeTargets"] if told else [{"labels": "none", "health": "unknown"}]
        return [target["labels"] for target in targets if target["health"] != "up"]

    wait(lambda: not down(), 120, "Prometheus reads all services")
    basalt.compose("rm", "--stop", "--force", "prometheus")


def test_an_upgrade_loses_no_job(basalt: Containers, trainer: openai.OpenAI) -> None:
    """Another tag, as docs/operations.md says it; of the same images, but every container is a new one."""
    job = submit(trainer, steps=40)
    wait(lambda: trainer.fine_tuning.jobs.checkpoints.list(job).data, 900, "a checkpoint")
    before = basalt.inspect("worker", "{{.Id}}")
    for service in ("gateway", "vision", "llm", "ui", "trainer", "worker", "evaluator"):
        image = basalt.inspect(service, "{{.Config.Image}}")
        subprocess.run(["docker", "tag", image, f"{image.rpartition(':')[0]}:upgraded"], check=True)
    basalt.variables["BASALT_TAG"] = "upgraded"
    basalt.compose("up", "-d", "--wait", "--no-build")
    assert basalt.inspect("worker", "{{.Id}}") != before
    wait(lambda: trainer.fine_tuning.jobs.retrieve(job).status in ("succeeded", "failed"), 1800, "the job's end")
    told = [event.message for event in trainer.fine_tuning.jobs.list_events(job, limit=100).data]
    assert trainer.fine_tuning.jobs.retrieve(job).status == "succeeded", told
    assert sum("stage1: step 5 " in message for message in told) == 1, told  # it went on where it was


def test_a_backup_is_restored(basalt: Containers, trainer: openai.OpenAI, tmp_path: Path) -> None:
    """The commands of docs/operations.md, with every volume gone in between."""
    jobs = {job.id: job.fine_tuned_model for job in trainer.fine_tuning.jobs.list(limit=100).data}
    model = next(name for name in jobs.values() if name)
    tar = ["docker", "run", "--rm", "-u", "0", "-v", f"{basalt.name}_objects:/objects", "-v", f"{tmp_path}:/backup"]
    tar += [basalt.inspect("gateway", "{{.Config.Image}}"), "tar", "-C", "/objects", "--xattrs", "--xattrs-include=*"]
    dump = "pg_dump -U basalt -Fc basalt > /tmp/basalt.dump"
    basalt.compose("exec", "-T", "postgres", "sh", "-c", dump)
    basalt.compose("cp", "postgres:/tmp/basalt.dump", str(tmp_path / "basalt.dump"))
    basalt.compose("stop", "minio")
    subprocess.run([*tar, "-cf", "/backup/objects.tar", "."], check=True)
    basalt.compose("down", "--volumes")
    basalt.compose("up", "-d", "--wait", "postgres")
    basalt.compose("create", "minio")
    subprocess.run([*tar, "-xf", "/backup/objects.tar"], check=True)
    basalt.compose("cp", str(tmp_path / "basalt.dump"), "postgres:/tmp/basalt.dump")
    restore = "pg_restore -U basalt -d basalt --clean --if-exists < /tmp/basalt.dump"
    basalt.compose("exec", "-T", "postgres", "sh", "-c", restore)
    basalt.compose("up", "-d", "--wait", "--no-build")
    assert {job.id: job.fine_tuned_model for job in trainer.fine_tuning.jobs.list(limit=100).data} == jobs
    assert answer(basalt, model=model)  # its parts come from the object store: every volume was empty


def test_a_full_volume_is_told_at_the_start(basalt: Containers) -> None:
    fill = "dd if=/dev/zero of=/store/all bs=4k count=9 2>/dev/null; exec python -m services.gateway"
    place = ["--tmpfs", "/store:size=4k,uid=10001", "-e", "BASALT_STORE=/store/full"]
    image = basalt.inspect("gateway", "{{.Config.Image}}")
    told = subprocess.run(
        ["docker", "run", "--rm", *place, image, "sh", "-c", fill], capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 2 and told.stderr.count("\n") == 1
    assert "BASALT_STORE=/store/full cannot be used" in told.stderr and "No space left" in told.stderr


def test_secrets_are_asked_for_beyond_loopback() -> None:
    opened = Containers("basalt-open", {"BASALT_BIND": "0.0.0.0"})
    with pytest.raises(AssertionError, match="BASALT_DATABASE_PASSWORD"):
        opened.compose("config", "-q")


def test_compose_is_valid() -> None:
    for override in ("gpu", "apis", "replicas"):
        files = ["-f", "docker-compose.yml", "-f", f"deploy/compose/{override}.yml", "--profile", "observability"]
        assert shutil.which("docker")
        Containers("basalt-check", {}).compose(*files, "config", "-q")
    assert (ROOT / ".env.example").is_file()
