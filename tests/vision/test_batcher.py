"""Batches: the most urgent first, bounded, without those nobody waits for."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.vision.batcher import Batcher


class Tower:
    """Notes its batches; the first one runs until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Event()

    def run(self, items: Sequence[str]) -> list[str]:
        self.batches.append(list(items))
        if "fail" in items:
            raise RuntimeError("broken")
        assert self.go.wait(10)
        return [item.upper() for item in items]


@pytest.fixture
def tower() -> Tower:
    return Tower()


@pytest.fixture
def batcher(tower: Tower) -> Iterator[Batcher[str, str]]:
    with ThreadPoolExecutor(1) as executor:
        yield Batcher(tower.run, executor, max_batch=2, wait_seconds=0)
        tower.go.set()


async def submitted(batcher: Batcher[str, str], **deadlines: float) -> dict[str, asyncio.Task[str]]:
    tasks = {item: asyncio.create_task(batcher.submit(item, deadline)) for item, deadline in deadlines.items()}
    await asyncio.sleep(0.05)
    return tasks


async def test_the_most_urgent_go_first(batcher: Batcher[str, str], tower: Tower):
    first = await submitted(batcher, running=9)
    rest = await submitted(batcher, late=8, soon=1, later=9, sooner=0.5)
    assert len(batcher) == 4
    tower.go.set()
    assert await asyncio.gather(*first.values(), *rest.values()) == ["RUNNING", "LATE", "SOON", "LATER", "SOONER"]
    assert tower.batches == [["running"], ["sooner", "soon"], ["late", "later"]]


async def test_what_nobody_waits_for_is_not_computed(batcher: Batcher[str, str], tower: Tower):
    first = await submitted(batcher, running=1)
    rest = await submitted(batcher, gone=2, kept=3)
    rest["gone"].cancel()
    tower.go.set()
    assert await first["running"] == "RUNNING"
    assert await rest["kept"] == "KEPT"
    assert tower.batches == [["running"], ["kept"]]


async def test_a_failed_batch_fails_its_own_items_only(batcher: Batcher[str, str], tower: Tower):
    tower.go.set()
    broken = await submitted(batcher, fail=1)
    with pytest.raises(RuntimeError, match="broken"):
        await broken["fail"]
    assert await batcher.submit("next", 2) == "NEXT"
