"""The whole stack, once per session, through the launcher that `make up` uses, on free ports."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 400


@dataclass
class Stack:
    launcher: psutil.Process
    gateway: str
    ui: str
    trainer: str
    evaluator: str
    log: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.gateway}/v1", api_key="none", max_retries=0, timeout=120)

    def service(self, name: str) -> psutil.Process:
        for child in self.launcher.children():
            if f"services.{name}" in child.cmdline():
                return child
        raise AssertionError(f"no process of {name}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Every service for real, in float32 so that answers can be compared with transformers'."""
    var = tmp_path_factory.mktemp("stack")
    gateway, ui, vision, llm, trainer, evaluator, redis = free_ports(7)
    environment = os.environ | {
        "BASALT_VAR": str(var),
        "BASALT_STORE": str(var / "objects"),
        "BASALT_GATEWAY_PORT": str(gateway),
        "BASALT_UI_PORT": str(ui),
        "BASALT_VISION_PORT": str(vision),
        "BASALT_LLM_PORT": str(llm),
        "BASALT_TRAINER_PORT": str(trainer),
        "BASALT_EVALUATOR_PORT": str(evaluator),
        "BASALT_REDIS_PORT": str(redis),
        "BASALT_LLM_DTYPE": "float32",
        "BASALT_VISION_DTYPE": "float32",
        "BASALT_GATEWAY_ALLOW_PRIVATE_HOSTS": "127.0.0.1",
    }
    log = var / "up.log"
    with log.open("w") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "basalt.up"], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + START_SECONDS
    while "Basalt is up" not in log.read_text():
        if launcher.poll() is not None or time.monotonic() > deadline:
            launcher.terminate()
            pytest.fail(f"the stack did not start:\n{log.read_text()[-4000:]}")
        time.sleep(0.5)
    urls = [f"http://127.0.0.1:{port}" for port in (gateway, ui, trainer, evaluator)]
    yield Stack(psutil.Process(launcher.pid), *urls, log)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 0, log.read_text()[-4000:]
