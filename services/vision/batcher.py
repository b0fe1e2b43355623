"""Items that arrive together go through the tower together, the most urgent first."""

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(order=True)
class _Waiting(Generic[Item, Result]):
    deadline: float  # of the event loop's clock
    order: int
    item: Item = field(compare=False)
    result: asyncio.Future[Result] = field(compare=False)


class Batcher(Generic[Item, Result]):
    """Collects items into batches for `run`, one batch at a time; while one runs, the next collects.

    A batch takes the items whose deadlines come first. One whose caller has gone, which it does at its deadline at the
    latest, is dropped before it is computed.

    Args:
        max_batch: items.
        wait_seconds: how long an idle batcher waits after an item for others to join it.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        executor: Executor,
        *,
        max_batch: int,
        wait_seconds: float,
    ) -> None:
        self._run = run
        self._executor = executor
        self._max_batch = max_batch
        self._wait_seconds = wait_seconds
        self._waiting: list[_Waiting[Item, Result]] = []  # a heap
        self._order = itertools.count()
        self._full = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Items that wait for a batch."""
        return len(self._waiting)

    async def submit(self, item: Item, deadline: float) -> Result:
        """The item's result. `deadline` is by the event loop's clock."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, _Waiting(deadline, next(self._order), item, result))
        if len(self._waiting) >= self._max_batch:
            self._full.set()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._drain())
        return await result

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):  # not full by then: what has come goes
            await asyncio.wait_for(self._full.wait(), self._wait_seconds)
        while batch := self._take():
            try:
                results = await asyncio.get_running_loop().run_in_executor(
                    self._executor, self._run, [each.item for each in batch]
                )
            except Exception as error:
                for each in batch:
                    if not each.result.done():
                        each.result.set_exception(error)
                continue
            for each, result in zip(batch, results, strict=True):
                if not each.result.done():
                    each.result.set_result(result)
        self._full.clear()

    def _take(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        while self._waiting and len(batch) < self._max_batch:
            each = heapq.heappop(self._waiting)
            if not each.result.done():  # its caller was cancelled: nobody wants it any more
                batch.append(each)
        return batch
