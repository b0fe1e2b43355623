"""Reading the state of record from an event loop: in threads of its own, never waiting long."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from basalt.breaker import Breaker
from basalt.record.database import Sessions

T = TypeVar("T")

THREADS = 4
PAUSE_SECONDS = 5.0  # without refreshing what is known
REFRESH_SECONDS = 0.25  # for the answer where an earlier one can stand in for it
ANSWER_SECONDS = 3.0  # where there is none


class Reader:
    """Reads within a deadline. After one that failed, what is known already is not asked for again for some seconds."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._threads = ThreadPoolExecutor(THREADS, "record")
        self._breaker = Breaker("state of record", (SQLAlchemyError,), PAUSE_SECONDS)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def read(self, query: Callable[[Session], T], *, known: T | None = None) -> T:
        """What `query` finds.

        Args:
            known: its result of earlier, which the caller takes where this raises: it is not waited for as long.

        Raises:
            Broken: the database cannot be read now.
        """

        def run() -> T:
            with self._sessions() as session:
                return query(session)

        loop = asyncio.get_running_loop()
        seconds = ANSWER_SECONDS if known is None else REFRESH_SECONDS
        return await self._breaker.run(lambda: loop.run_in_executor(self._threads, run), seconds, insist=known is None)
