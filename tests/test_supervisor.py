"""The supervisor on real processes: small Python programs that end, crash, hang on and leave children."""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from basalt import supervisor
from basalt.supervisor import Service, StartError

PATIENCE = 60  # seconds; a busy machine is slow to start a Python


def service(tmp_path: Path, program: str) -> Service:
    """A service that is healthy once it has written `healthy`."""

    async def healthy() -> bool:
        return (tmp_path / "healthy").exists()

    return Service("one", [sys.executable, "-c", program], healthy, tmp_path / "one.log")


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "HERE": str(tmp_path)}


async def until(condition: Callable[[], bool]) -> None:
    def poll() -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    await asyncio.to_thread(poll)


def started(tmp_path: Path) -> list[int]:
    """The process ids of all starts so far."""
    path = tmp_path / "started"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def alive(pid: int) -> bool:
    """Is there a process that still runs (not one that only waits to be collected)?"""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


HERE = "import os, pathlib, signal, subprocess, sys, time; here = pathlib.Path(os.environ['HERE']);"
STARTED = "print(os.getpid(), file=(here / 'started').open('a'));(here / 'healthy').touch();"


async def test_a_service_that_dies_is_started_again_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = service(tmp_path, HERE + STARTED + "time.sleep(1000)")
    task = asyncio.create_task(one.keep_running(environment(tmp_path)))
    async with asyncio.timeout(PATIENCE):
        await one.ready.wait()
    os.kill(started(tmp_path)[0], 9)
    await until(lambda: len(started(tmp_path)) == 2)
    second = started(tmp_path)[1]
    assert alive(second)
    await cancelled(task)
    assert not alive(second)
    assert "one ended with -9; starting it again in 2 s" in capsys.readouterr().out


async def test_children_of_a_killed_service_do_not_outlive_it(tmp_path: Path) -> None:
    child = "child = subprocess.Popen(['sleep', '1000']); (here / 'child').write_text(str(child.pid));"
    one = service(tmp_path, HERE + child + STARTED + "time.sleep(1000)")
    task = asyncio.create_task(one.keep_running(environment(tmp_path)))
    async with asyncio.timeout(PATIENCE):
        await one.ready.wait()
    orphan = int((tmp_path / "child").read_text())
    assert alive(orphan)
    os.kill(started(tmp_path)[0], 9)
    await until(lambda: not alive(orphan))
    await cancelled(task)


async def test_ending_while_starting_is_an_error_with_the_end_of_the_log(tmp_path: Path) -> None:
    one = service(tmp_path, "raise SystemExit('the weights are missing')")
    with pytest.raises(StartError, match=r"(?s)one ended with 1 while starting.*the weights are missing"):
        await one.keep_running(environment(tmp_path))


async def test_stopping_asks_first_and_kills_what_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 1)
    deaf = "signal.signal(signal.SIGTERM, lambda *_: (here / 'asked').touch());"
    one = service(tmp_path, HERE + deaf + STARTED + "\nwhile True: time.sleep(1)")
    task = asyncio.create_task(one.keep_running(environment(tmp_path)))
    async with asyncio.timeout(PATIENCE):
        await one.ready.wait()
    pid = started(tmp_path)[0]
    began = time.monotonic()
    await cancelled(task)
    assert (tmp_path / "asked").exists()
    assert not alive(pid)
    assert time.monotonic() - began >= 1
