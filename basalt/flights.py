"""Callers that want the same at the same time share one computation."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Callers that ask for the same key at the same time share one computation.

    It is cancelled when the last of them has given up, and not before.
    """

    def __init__(self) -> None:
        self._flights: dict[K, tuple[asyncio.Task[V], list[object]]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    async def run(self, key: K, compute: Callable[[], Awaitable[V]]) -> V:
        if key not in self._flights:
            task = asyncio.ensure_future(_awaited(compute))
            self._flights[key] = (task, [])
            task.add_done_callback(lambda done: self._forget(key, done))
        task, waiters = self._flights[key]
        me = object()
        waiters.append(me)
        try:
            return await asyncio.shield(task)
        finally:
            waiters.remove(me)
            if not waiters and not task.done():
                self._forget(key, task)  # at once: a newcomer must not join what is being cancelled
                task.cancel()

    def _forget(self, key: K, task: asyncio.Task[V]) -> None:
        if key in self._flights and self._flights[key][0] is task:
            del self._flights[key]


async def _awaited(compute: Callable[[], Awaitable[V]]) -> V:
    return await compute()
