"""Requests, tokens and fetches by the minute; turns where more is asked than can be done at once."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basalt.api_errors import APIError
from basalt.auth import Caller
from basalt.record.api_keys import create_key
from basalt.record.database import open_database
from services.gateway.app import KEY_SECONDS
from services.gateway.limits import NO_NEED, Buckets, FairQueue, Limits, Room, Take
from tests.gateway.conftest import Stack, free_port, wait_for
from tests.valkey import Valkey, valkey_in


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with valkey_in(tmp_path_factory.mktemp("valkey")) as server:
        yield server


async def test_a_bucket_holds_a_minutes_worth_and_fills_steadily(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    buckets = Buckets(None)
    one = Take("a", 60, 1, 1)
    assert [await buckets.take(one) for _ in range(60)] == [[0.0]] * 60
    assert await buckets.take(one) == [1.0]
    now = 0.5
    assert await buckets.take(one) == [0.5]
    now = 1.0
    assert await buckets.take(one) == [0.0]
    now = 1000.0  # no more than a minute's worth
    assert [await buckets.take(one) for _ in range(60)] == [[0.0]] * 60
    assert (await buckets.take(one))[0] > 0


async def test_all_is_taken_or_nothing() -> None:
    buckets = Buckets(None)
    plenty, empty = Take("plenty", 2, 1, 1), Take("empty", 1, 1, 1)
    assert await buckets.take(empty) == [0.0]
    for _ in range(5):
        lacking = await buckets.take(plenty, empty)
        assert lacking[0] == 0 and lacking[1] > 0
    assert await buckets.take(plenty) == [0.0] and await buckets.take(plenty) == [0.0]


async def test_tokens_are_counted_when_they_are_known_and_leave_a_debt() -> None:
    limits = Limits({"tokens_per_minute": 100}, Buckets(None))
    caller = Caller("key-1")
    await limits.ask(caller)
    await limits.used(caller, 250)
    with pytest.raises(APIError, match="100 tokens a minute") as refused:
        await limits.ask(caller)
    assert refused.value.status == 429 and 85 <= refused.value.retry_after <= 95  # 151 tokens at 100 a minute
    await limits.ask(Caller("key-2"))  # another's are another's


async def test_a_keys_own_limits_stand_before_the_defaults() -> None:
    limits = Limits({"requests_per_minute": 1, "tokens_per_minute": None}, Buckets(None))
    generous = Caller("key-1", limits={"requests_per_minute": 3})
    for _ in range(3):
        await limits.ask(generous)
    with pytest.raises(APIError):
        await limits.ask(generous)


async def test_without_redis_limits_are_the_processs_own() -> None:
    buckets = Buckets(f"redis://127.0.0.1:{free_port()}/0")
    began = time.monotonic()
    assert await buckets.take(Take("a", 1, 1, 1)) == [0.0]
    assert (await buckets.take(Take("a", 1, 1, 1)))[0] > 0
    assert time.monotonic() - began < 2
    await buckets.close()


async def test_replicas_share_their_limits_in_redis(valkey: Valkey) -> None:
    one, two = Buckets(valkey.url), Buckets(valkey.url)
    take = Take(f"shared-{time.time()}", 2, 1, 1)
    assert await one.take(take) == [0.0] and await two.take(take) == [0.0]
    assert 25 < (await one.take(take))[0] <= 30 and 25 < (await two.take(take))[0] <= 30
    debt = Take(take.bucket, 2, NO_NEED, 4)
    assert await one.take(debt) == [0.0]
    assert 140 < (await two.take(take))[0] <= 150
    await one.close()
    await two.close()


async def test_a_redis_that_is_frozen_costs_one_short_wait(valkey: Valkey) -> None:
    buckets = Buckets(valkey.url)
    assert await buckets.take(Take("frozen", 100, 1, 1)) == [0.0]
    with valkey.frozen():
        began = time.monotonic()
        for _ in range(50):
            assert await buckets.take(Take("frozen", 100, 1, 1)) == [0.0]
        assert time.monotonic() - began < 1
    await buckets.close()


async def test_callers_take_turns_however_many_requests_each_has() -> None:
    queue, order = FairQueue(1, 100, 5), []

    async def ask(caller: str) -> None:
        async with queue.turn(caller):
            order.append(caller)
            await asyncio.sleep(0)

    greedy = [asyncio.create_task(ask("greedy")) for _ in range(20)]
    await asyncio.sleep(0)
    modest = [asyncio.create_task(ask("modest")) for _ in range(2)]
    await asyncio.gather(*greedy, *modest)
    assert len(order) == 22 and max(i for i, who in enumerate(order) if who == "modest") <= 5


async def test_a_callers_own_limit_keeps_only_it_waiting() -> None:
    queue = FairQueue(4, 100, 0.05)
    async with AsyncExitStack() as inside:
        await inside.enter_async_context(queue.turn("a", 1))
        with pytest.raises(APIError, match="1 requests answered at the same time") as refused:
            await inside.enter_async_context(queue.turn("a", 1))
        assert refused.value.status == 429
        async with queue.turn("b", 1):
            pass


async def test_who_has_most_waiting_gives_way() -> None:
    queue = FairQueue(1, 3, 5)
    async with queue.turn("first"):

        async def wait(caller: str) -> str:
            try:
                async with queue.turn(caller):
                    return "in"
            except APIError as error:
                return str(error.status)

        greedy = [asyncio.create_task(wait("greedy")) for _ in range(3)]
        await asyncio.sleep(0)
        modest = asyncio.create_task(wait("modest"))
        await asyncio.sleep(0)
        assert await wait("greedy") == "503"
    assert await modest == "in"
    assert sorted(await asyncio.gather(*greedy)) == ["503", "in", "in"]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_turn_is_given_back(data: st.DataObject) -> None:
    """Whatever is cancelled, fails or waits too long: at the end all are out, and nobody was in beyond the capacity."""

    async def scenario() -> None:
        capacity = data.draw(st.integers(1, 3))
        queue = FairQueue(capacity, data.draw(st.integers(0, 6)), 0.02)
        inside = 0

        async def one(caller: str, seconds: float) -> None:
            nonlocal inside
            async with queue.turn(caller, limit):
                inside += 1
                assert inside <= capacity
                try:
                    await asyncio.sleep(seconds)
                finally:
                    inside -= 1

        limit = data.draw(st.none() | st.integers(1, 2))
        tasks = []
        for _ in range(data.draw(st.integers(1, 12))):
            caller, seconds = data.draw(st.sampled_from("abc")), data.draw(st.sampled_from((0, 0.001, 0.03)))
            tasks.append(asyncio.create_task(one(caller, seconds)))
            if data.draw(st.booleans()):
                await asyncio.sleep(0)
            if data.draw(st.integers(0, 3)) == 0:
                data.draw(st.sampled_from(tasks)).cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, APIError | asyncio.CancelledError), result
        assert not queue._inside and not queue._waiting

    asyncio.run(scenario())


def test_bodies_that_are_held_have_an_end() -> None:
    room = Room(10)
    room.take(6)
    with pytest.raises(APIError, match="more to do than it can"):
        room.take(5)
    room.give_back(6)
    room.take(10)


@pytest.fixture(scope="module")
def keyed(start: Callable[..., Stack]) -> tuple[Stack, Callable[..., dict[str, str]]]:
    """A gateway that wants keys, and a maker of headers."""
    stack = start(require_key=True, service_key="between-us", max_image_bytes=50_000)
    return stack, lambda **limits: key_of(stack, **limits)


def key_of(stack: Stack, database: str = "", **limits: int) -> dict[str, str]:
    """A new key, as a header."""
    with open_database(database or f"sqlite:///{stack.objects.parent / 'basalt.db'}").begin() as session:
        return {"Authorization": f"Bearer {create_key(session, 'test', ('chat',), limits)[1]}"}


def waiting(stack: Stack) -> float:
    told = httpx.get(f"{stack.url}/metrics", trust_env=False).text
    return float(next(line for line in told.splitlines() if line.startswith("basalt_gateway_waiting")).split()[1])


SLOW = [{"role": "user", "content": "slow"}]


def chat(stack: Stack, headers: dict[str, str], **fields: Any) -> httpx.Response:
    body = {"model": "one", "messages": [{"role": "user", "content": "Hi"}]} | fields
    return httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)


def test_every_route_that_answers_wants_a_key(keyed: tuple[Stack, Callable[..., dict[str, str]]]) -> None:
    stack, key = keyed
    for path in ("/v1/models", "/v1/models/one"):
        assert httpx.get(stack.url + path).status_code == 401
        assert httpx.get(stack.url + path, headers=key()).status_code == 200
    refused = chat(stack, {})
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    assert chat(stack, key()).status_code == 200
    assert chat(stack, {"Authorization": "Bearer between-us"}).status_code == 200
    for path in ("/healthz", "/metrics"):
        assert httpx.get(stack.url + path).status_code == 200


def test_requests_and_tokens_by_the_minute_over_http(keyed: tuple[Stack, Callable[..., dict[str, str]]]) -> None:
    stack, key = keyed
    mine = key(requests_per_minute=2)
    assert [chat(stack, mine).status_code for _ in range(3)] == [200, 200, 429]
    refused = chat(stack, mine)
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    few = key(tokens_per_minute=1)
    assert chat(stack, few).status_code == 200
    assert chat(stack, few, stream=True).status_code == 429
    streamed = key(tokens_per_minute=1)
    assert "[DONE]" in chat(stack, streamed, stream=True).text
    assert chat(stack, streamed).status_code == 429


def test_requests_are_counted_by_assistant_and_refusals_by_limit(
    keyed: tuple[Stack, Callable[..., dict[str, str]]],
) -> None:
    stack, key = keyed
    chat(stack, key())
    told = httpx.get(f"{stack.url}/metrics").text
    assert 'basalt_gateway_requests_total{assistant="one",route="/v1/chat/completions",status="200"}' in told
    assert 'basalt_gateway_refused_total{limit="requests_per_minute"}' in told
    assert 'basalt_gateway_tokens_total{assistant="one",kind="completion"}' in told


def test_a_greedy_key_does_not_starve_another(start: Callable[..., Stack]) -> None:
    """One keeps forty requests waiting where two are answered at a time: another's wait for about one turn each."""
    stack = start(require_key=True, max_running=2, max_waiting=64)
    greedy, modest = key_of(stack), key_of(stack)
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(chat, stack, greedy, messages=SLOW) for _ in range(40)]
        wait_for(lambda: waiting(stack) > 15)
        took = []
        for _ in range(4):
            began = time.monotonic()
            assert chat(stack, modest, messages=SLOW).status_code == 200
            took.append(time.monotonic() - began)
        still = sum(not each.done() for each in asked)
        assert {each.result().status_code for each in asked} == {200}
    assert still > 3  # the greedy one was far from done
    assert max(took) < 2


def test_more_than_can_be_done_is_refused_with_when_to_come_again(start: Callable[..., Stack]) -> None:
    stack = start(require_key=True, max_running=1, max_waiting=4, wait_seconds=20)
    mine, limited = key_of(stack), key_of(stack, concurrent_requests=1)
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda _: chat(stack, mine, messages=SLOW), range(30)))
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "overloaded"
            assert int(answer.headers["Retry-After"]) >= 1
    assert chat(stack, mine).status_code == 200
    impatient = start(require_key=True, wait_seconds=0.05)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: chat(impatient, limited, messages=SLOW), range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429, 429]
    assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 429)


def test_chat_goes_on_while_redis_is_frozen_or_gone(start: Callable[..., Stack], valkey: Valkey) -> None:
    stack = start(require_key=True, requests_per_minute=1000, BASALT_REDIS_URL=valkey.url)
    mine = key_of(stack)
    assert chat(stack, mine).status_code == 200
    with valkey.frozen():
        began = time.monotonic()
        assert [chat(stack, mine).status_code for _ in range(10)] == [200] * 10
        assert time.monotonic() - began < 5
    gone = start(requests_per_minute=3, BASALT_REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    assert [chat(gone, {}).status_code for _ in range(4)] == [200, 200, 200, 429]  # its own limits hold


def test_chat_goes_on_while_the_state_of_record_is_frozen(start: Callable[..., Stack], tmp_path: Path) -> None:
    stack = start(require_key=True, BASALT_DATABASE=f"sqlite:///{tmp_path}/basalt.db")
    mine = key_of(stack, f"sqlite:///{tmp_path}/basalt.db")
    assert chat(stack, mine).status_code == 200
    frozen = sqlite3.connect(tmp_path / "basalt.db", isolation_level=None)
    frozen.execute("BEGIN EXCLUSIVE")
    time.sleep(KEY_SECONDS)
    began = time.monotonic()
    assert [chat(stack, mine).status_code for _ in range(10)] == [200] * 10
    assert time.monotonic() - began < 5
    assert chat(stack, {"Authorization": "Bearer bsk-unknown"}).status_code == 503
    frozen.execute("ROLLBACK")
    assert chat(stack, {"Authorization": "Bearer bsk-unknown"}).status_code == 401


def test_bodies_beyond_what_may_be_held_are_refused(start: Callable[..., Stack]) -> None:
    stack = start(max_held_bytes=100_000)
    refused = chat(stack, {}, padding="x" * 200_000)
    assert refused.status_code == 503 and "Retry-After" in refused.headers
    assert chat(stack, {}).status_code == 200
