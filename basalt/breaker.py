"""Asking what may be dead or frozen, without waiting on it again and again."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger("basalt")


class Broken(Exception):
    """It failed, did not answer in time, or did so a moment ago."""


class Breaker:
    """Gives every call a deadline; after a failure nobody is let through for a while who does not insist.

    Args:
        name: for the log.
        failures: what counts as one, besides a deadline that passes; anything else is raised as it is.
        pause_seconds: without calling again.
    """

    def __init__(self, name: str, failures: tuple[type[Exception], ...], pause_seconds: float) -> None:
        self._name, self._failures, self._pause_seconds = name, failures, pause_seconds
        self._paused_until = 0.0

    async def run(self, call: Callable[[], Awaitable[T]], seconds: float, *, insist: bool = False) -> T:
        """
        Raises:
            Broken.
        """
        if time.monotonic() < self._paused_until and not insist:
            raise Broken(f"{self._name} failed a moment ago")
        try:
            async with asyncio.timeout(seconds):
                return await call()
        except (TimeoutError, *self._failures) as error:
            # Not in its own words: drivers tell statements and addresses.
            why = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
            self._paused_until = time.monotonic() + self._pause_seconds
            log.warning("%s: %s", self._name, why)
            raise Broken(f"{self._name}: {why}") from error
