"""Keeps one process running: started, found healthy, started again when it ends, stopped."""

import asyncio
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

GRACE_SECONDS = 25  # between SIGTERM and SIGKILL
LONGEST_PAUSE = 30  # seconds before a service that keeps ending is started again
PR_SET_PDEATHSIG = 1  # of prctl(2)


class StartError(Exception):
    """A service ended before it was healthy for the first time, or was not healthy in time."""


@dataclass
class Service:
    """One process, kept running. `healthy` asks it over its own interface."""

    name: str
    command: list[str]
    healthy: Callable[[], Awaitable[bool]]
    log: Path
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # set when first healthy

    async def keep_running(self, environment: dict[str, str]) -> None:
        """Runs until cancelled, then stops the process.

        Raises:
            StartError: it ended before it was healthy for the first time.
        """
        self.log.write_bytes(b"")
        pause = 1
        while True:
            began = time.monotonic()
            code = await self.run_once(environment)
            if not self.ready.is_set():
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise StartError(f"{self.name} ended with {code} while starting. The end of {self.log}:\n{tail}")
            pause = 1 if time.monotonic() - began > 60 else min(pause * 2, LONGEST_PAUSE)
            say(f"{self.name} ended with {code}; starting it again in {pause} s ({self.log})")
            await asyncio.sleep(pause)

    async def run_once(self, environment: dict[str, str]) -> int:
        """Starts the process and returns its exit code; cancelled, it stops the process first."""
        began = time.monotonic()
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        waiting = asyncio.create_task(self.report_health(began))
        try:
            return await process.wait()
        finally:
            waiting.cancel()
            await stop(process)

    async def report_health(self, began: float) -> None:
        while not await self.healthy():  # noqa: ASYNC110 (another process has no asyncio.Event of ours)
            await asyncio.sleep(0.5)
        say(f"{self.name} is healthy after {time.monotonic() - began:.0f} s")
        self.ready.set()


async def stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, time to finish, then SIGKILL for what is left of its process group."""
    with suppress(ProcessLookupError):
        process.terminate()
    with suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def end_with_parent() -> None:
    """In the child: SIGTERM when the launcher itself is killed, so that nothing outlives it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def say(text: str) -> None:
    print(text, flush=True)
