"""Embeddings in a real Valkey: exact bytes for every replica, a byte budget by use, and life without it."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis.asyncio

from basalt.handoff import Blob
from basalt.rpc.vision.v1 import vision_pb2
from services.vision import shared_cache
from services.vision.shared_cache import TOTAL, SharedCache
from tests.tiny import picture
from tests.valkey import Valkey, valkey_in
from tests.vision.conftest import Start


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with valkey_in(tmp_path / "valkey") as server:
        yield server


def blob(fill: int) -> Blob:
    return Blob(bytes([fill]) * 320, (10, 8), "float32")


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


async def test_another_replica_need_not_run_the_tower(start: Start, valkey: Valkey):
    first = await start(BASALT_REDIS_URL=valkey.url)
    second = await start(BASALT_REDIS_URL=valkey.url)
    request = vision_pb2.EmbedRequest(assistant="one", image_bytes=picture(1))
    computed = await first.stub.Embed(request)
    await asyncio.gather(*first.embedder._storing)
    found = await second.stub.Embed(request)
    assert (found.cached, found.data) == (vision_pb2.CACHED_EMBEDDINGS, computed.data)
    assert second.batches == []


async def test_the_least_recently_used_goes_first_and_the_budget_holds(valkey: Valkey):
    size = len(blob(0).header()) + 320
    cache = SharedCache(valkey.url, 3 * size)
    for number in range(3):
        await cache.put(digest(number), blob(number))
        await asyncio.sleep(0.002)
    assert await cache.get(digest(0)) is not None
    await asyncio.sleep(0.002)
    await cache.put(digest(3), blob(3))
    await cache.put(digest(3), blob(3))  # again: counted once
    there = [await cache.get(digest(number)) for number in range(4)]
    assert [found is not None for found in there] == [True, False, True, True]
    assert there[3] is not None
    assert bytes(there[3].data) == blob(3).data
    async with redis.asyncio.from_url(valkey.url) as client:
        assert int(await client.get(TOTAL)) == 3 * size
    await cache.put(digest(9), Blob(bytes(32_000), (1000, 8), "float32"))  # larger than all
    assert await cache.get(digest(9)) is None
    await cache.close()


async def test_rubbish_under_a_digest_is_a_miss(valkey: Valkey):
    cache = SharedCache(valkey.url, 10_000)
    async with redis.asyncio.from_url(valkey.url) as client:
        await client.set(shared_cache.VALUES + digest(1), b"rubbish")
    assert await cache.get(digest(1)) is None
    await cache.close()


async def test_a_frozen_redis_costs_one_short_wait_and_comes_back(
    start: Start, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shared_cache, "PAUSE_SECONDS", 1.0)
    vision = await start(BASALT_REDIS_URL=valkey.url)
    with valkey.frozen():
        began = time.monotonic()
        for number in range(5):
            request = vision_pb2.EmbedRequest(assistant="one", image_bytes=picture(number))
            assert (await vision.stub.Embed(request)).data
        assert time.monotonic() - began < 5
    await asyncio.sleep(1.2)
    await vision.stub.Embed(vision_pb2.EmbedRequest(assistant="one", image_bytes=picture(9)))
    await asyncio.gather(*vision.embedder._storing)
    async with redis.asyncio.from_url(valkey.url) as client:
        assert await client.exists(TOTAL)


async def test_no_redis_at_all(start: Start):
    vision = await start(BASALT_REDIS_URL="redis://127.0.0.1:9/0")
    for number in range(3):
        request = vision_pb2.EmbedRequest(assistant="one", image_bytes=picture(number))
        assert (await vision.stub.Embed(request)).data
