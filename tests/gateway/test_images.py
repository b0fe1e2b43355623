"""Images by URL: fetched once for all who ask, and not again for a while."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from basalt.api_errors import APIError
from basalt.auth import Caller
from basalt.object_store import DirectoryStore
from services.gateway.fetch import Fetcher
from services.gateway.images import ImageIntake
from services.gateway.limits import Buckets, Limits
from services.gateway.settings import Settings
from tests.gateway.web import Handler, answer, web
from tests.stack.test_stack import shape

Intake = Callable[..., ImageIntake]


@pytest.fixture
def intake(tmp_path: Path) -> Intake:
    def make(**given: object) -> ImageIntake:
        fetcher = Fetcher(
            max_bytes=1 << 20, connect_seconds=30, total_seconds=60, private_hosts=frozenset({"127.0.0.1"})
        )
        limits = Limits({"fetches_per_minute": 200}, Buckets(None))
        return ImageIntake(fetcher, limits, DirectoryStore(tmp_path), Settings(**given))  # type: ignore[arg-type]

    return make


@asynccontextmanager
async def opened(images: ImageIntake) -> AsyncIterator[ImageIntake]:
    try:
        yield images
    finally:
        await images.close()


def slowly(handler: Handler) -> Handler:
    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await handler(head, writer)

    return handle


async def test_a_hundred_clients_one_fetch(intake: Intake) -> None:
    async with web(slowly(answer(shape("red")))) as server, opened(intake()) as images:
        taken = await asyncio.gather(*(images.take(server.url(), "p", Caller(f"key-{n}")) for n in range(100)))
        assert len({image.id for image in taken}) == 1 and len(server.heads) == 1
        await images.take(server.url(), "p", Caller())
        assert len(server.heads) == 1
        await images.take(server.url("/other"), "p", Caller())
        assert len(server.heads) == 2


async def test_what_is_old_is_fetched_again(intake: Intake) -> None:
    async with web(answer(shape("red"))) as server, opened(intake(fetched_fresh_seconds=0)) as images:
        for _ in range(3):
            await images.take(server.url(), "p", Caller())
        assert len(server.heads) == 3


async def test_one_that_gives_up_takes_nothing_from_the_others(intake: Intake) -> None:
    async with web(slowly(answer(shape("red")))) as server, opened(intake()) as images:
        impatient, patient = (asyncio.create_task(images.take(server.url(), "p", Caller())) for _ in range(2))
        await asyncio.sleep(0.1)
        impatient.cancel()
        assert (await patient).data == shape("red")
        assert len(server.heads) == 1


async def test_a_failure_is_everybodys_and_is_not_kept(intake: Intake) -> None:
    failing, working = slowly(answer(b"", "404 Not Found")), answer(shape("red"))
    served = [failing]

    async def handle(head: str, writer: asyncio.StreamWriter) -> None:
        await served[0](head, writer)

    async with web(handle) as server, opened(intake()) as images:
        all_of_them = [images.take(server.url(), "p", Caller()) for _ in range(3)]
        told = await asyncio.gather(*all_of_them, return_exceptions=True)
        assert all(isinstance(each, APIError) and each.code == "image_not_fetched" for each in told)
        assert len(server.heads) == 1
        served[0] = working
        assert (await images.take(server.url(), "p", Caller())).data == shape("red")


async def test_fetches_by_the_minute(intake: Intake) -> None:
    async with web(answer(shape("red"))) as server, opened(intake()) as images:
        caller = Caller("key-1", limits={"fetches_per_minute": 2})
        for n in range(2):
            await images.take(server.url(f"/{n}"), "p", caller)
        with pytest.raises(APIError) as refused:
            await images.take(server.url("/2"), "p", caller)
        assert refused.value.status == 429 and len(server.heads) == 2
