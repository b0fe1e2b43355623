"""Computing things once: an LRU bounded by bytes, and the sharing of work in flight."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteLRU(Generic[K, V]):
    """The most recently used values, together at most `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0  # bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keeps `value` of `size` bytes. A value larger than the whole cache is not kept."""
        if size > self.capacity:
            return
        if key in self._entries:
            self.used -= self._entries.pop(key)[1]
        self._entries[key] = (value, size)
        self.used += size
        while self.used > self.capacity:
            _, (_, freed) = self._entries.popitem(last=False)
            self.used -= freed


class SingleFlight(Generic[K, V]):
    """Callers that ask for the same key at the same time share one computation.

    It is cancelled when the last of them has given up, and not before.
    """

    def __init__(self) -> None:
        self._flights: dict[K, tuple[asyncio.Task[V], list[object]]] = {}

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
