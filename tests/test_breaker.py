import asyncio
import time

import pytest

from basalt.breaker import Breaker, Broken


async def test_what_does_not_answer_is_waited_for_once_in_a_while():
    breaker, asked = Breaker("clock", (), 0.2), 0

    async def hang() -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(60)

    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(Broken, match="clock"):
            await breaker.run(hang, 0.05)
    assert asked == 1 and time.monotonic() - began < 0.2
    with pytest.raises(Broken):
        await breaker.run(hang, 0.01, insist=True)
    assert asked == 2
    await asyncio.sleep(0.2)
    assert await breaker.run(lambda: asyncio.sleep(0, "back"), 1) == "back"


async def test_only_what_is_a_failure_counts_as_one():
    breaker = Breaker("store", (OSError,), 60)

    async def fail(error: Exception) -> None:
        raise error

    with pytest.raises(KeyError):
        await breaker.run(lambda: fail(KeyError()), 1)
    with pytest.raises(Broken, match=r"store: OSError$"):
        await breaker.run(lambda: fail(OSError("10.0.0.7 refused")), 1)
    with pytest.raises(Broken, match="a moment ago"):
        await breaker.run(lambda: asyncio.sleep(0), 1)
