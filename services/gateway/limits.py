"""How much a caller may ask for, and whose turn it is where more is asked than can be done at once."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import redis.asyncio
from redis.exceptions import RedisError

from basalt.api_errors import APIError
from basalt.auth import Caller
from services.gateway import telemetry

log = logging.getLogger("basalt.gateway")

MINUTE = 60.0
ANSWER_SECONDS = 0.1  # for Redis to answer
PAUSE_SECONDS = 5.0  # without asking it again
MAX_BUCKETS = 100_000
NO_NEED = -1e12  # taken whatever is there

# Keys: buckets. Arguments, for each: what fits in, what comes in a second, what must be there, what is taken.
# Answers how many seconds each lacks; where one lacks any, nothing is taken.
TAKE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local levels, lacking, short = {}, {}, false
for i, key in ipairs(KEYS) do
  local size, rate, need = tonumber(ARGV[4*i-3]), tonumber(ARGV[4*i-2]), tonumber(ARGV[4*i-1])
  local level = tonumber(redis.call('HGET', key, 'level') or size)
  local at = tonumber(redis.call('HGET', key, 'at') or now)
  levels[i] = math.min(size, level + (now - at) * rate)
  lacking[i] = tostring(math.max(0, (need - levels[i]) / rate))
  short = short or levels[i] < need
end
if short then return lacking end
for i, key in ipairs(KEYS) do
  local size, rate, taken = tonumber(ARGV[4*i-3]), tonumber(ARGV[4*i-2]), tonumber(ARGV[4*i])
  redis.call('HSET', key, 'level', tostring(levels[i] - taken), 'at', tostring(now))
  redis.call('EXPIRE', key, math.ceil((size - levels[i] + taken) / rate) + 1)
end
return lacking
"""


@dataclass(frozen=True)
class Take:
    """What is asked of one bucket, which holds what may be had in a minute and fills up steadily."""

    bucket: str
    per_minute: int
    need: float  # must be there
    amount: float  # is taken; it may leave the bucket in debt

    @property
    def rate(self) -> float:
        return self.per_minute / MINUTE


class Buckets:
    """Token buckets: in Redis, for all replicas of the gateway, where there is one; else this process's own."""

    def __init__(self, redis_url: str | None) -> None:
        self._own: dict[str, tuple[float, float]] = {}  # level, and when it was that
        self._paused_until = 0.0
        seconds = {"socket_timeout": ANSWER_SECONDS, "socket_connect_timeout": ANSWER_SECONDS}
        self._redis = redis.asyncio.from_url(redis_url, retry=None, **seconds) if redis_url else None
        self._script = self._redis.register_script(TAKE) if self._redis else None

    async def close(self) -> None:
        if self._redis:
            await self._redis.aclose()

    async def take(self, *takes: Take) -> list[float]:
        """Takes from all buckets, or from none: the seconds until each has what is needed, all 0 if it was taken."""
        if self._script and time.monotonic() >= self._paused_until:
            keys = [f"basalt:limit:{take.bucket}" for take in takes]
            arguments = [n for take in takes for n in (take.per_minute, take.rate, take.need, take.amount)]
            try:
                return [float(seconds) for seconds in await self._script(keys, arguments)]
            except (RedisError, OSError) as error:
                log.warning("redis: %s; limits are this process's own for a while", type(error).__name__)
                self._paused_until = time.monotonic() + PAUSE_SECONDS
        return self._take(takes)

    def _take(self, takes: tuple[Take, ...]) -> list[float]:
        now = time.monotonic()
        if len(self._own) > MAX_BUCKETS:
            self._own.clear()
        levels = []
        for take in takes:
            level, at = self._own.get(take.bucket, (take.per_minute, now))
            levels.append(min(take.per_minute, level + (now - at) * take.rate))
        lacking = [max(0.0, (take.need - level) / take.rate) for take, level in zip(takes, levels, strict=True)]
        if not any(lacking):
            self._own |= {take.bucket: (lv - take.amount, now) for take, lv in zip(takes, levels, strict=True)}
        return lacking


class Limits:
    """The limits by the minute. A key's own stand before `defaults`; what neither names is not limited."""

    def __init__(self, defaults: Mapping[str, int | None], buckets: Buckets) -> None:
        self._defaults, self._buckets = defaults, buckets

    def of(self, caller: Caller, name: str) -> int | None:
        return caller.limits.get(name, self._defaults.get(name))

    async def ask(self, caller: Caller) -> None:
        """Counts a request.

        Raises:
            APIError: 429, there were too many, or too many tokens.
        """
        await self._take(caller, requests_per_minute=(1, 1), tokens_per_minute=(1, 0))

    async def fetch(self, caller: Caller) -> None:
        """Counts an image URL.

        Raises:
            APIError: 429.
        """
        await self._take(caller, fetches_per_minute=(1, 1))

    async def used(self, caller: Caller, tokens: int) -> None:
        """Counts tokens after the answer, when their number is known."""
        await self._take(caller, tokens_per_minute=(NO_NEED, tokens))

    async def _take(self, caller: Caller, **wanted: tuple[float, float]) -> None:
        takes = {
            name: Take(f"{caller.id}:{name}", per_minute, *wanted[name])
            for name in wanted
            if (per_minute := self.of(caller, name))
        }
        if not takes:
            return
        lacking = dict(zip(takes, await self._buckets.take(*takes.values()), strict=True))
        name = max(lacking, key=lambda each: lacking[each])
        if lacking[name] > 0:
            what = name.removesuffix("_per_minute")
            message = f"this API key may ask for {takes[name].per_minute:,} {what} a minute: try again later"
            raise _too_many(message, name, lacking[name])


class FairQueue:
    """Lets so many in at a time. The others wait, and callers take turns, however many requests each has waiting.

    Args:
        capacity: requests inside.
        max_waiting: in all; beyond it, whoever has most waiting loses the last of them.
        patience: seconds that one waits.
    """

    def __init__(self, capacity: int, max_waiting: int, patience: float) -> None:
        self._capacity, self._max_waiting, self._patience = capacity, max_waiting, patience
        self._inside: dict[str, int] = {}  # by caller
        self._waiting: dict[str, deque[tuple[asyncio.Future[None], int]]] = {}  # in the order of turns

    @asynccontextmanager
    async def turn(self, caller: str, limit: int | None = None) -> AsyncIterator[None]:
        """Inside.

        Args:
            limit: requests of this caller that may be inside.

        Raises:
            APIError: 429 where it was the caller's own limit that it waited for, 503.
        """
        limit = limit or self._capacity
        if not self._let_in(caller, limit):
            await self._wait(caller, limit)
        telemetry.RUNNING.inc()
        try:
            yield
        finally:
            telemetry.RUNNING.dec()
            self._leave(caller)

    def _let_in(self, caller: str, limit: int) -> bool:
        inside = self._inside.get(caller, 0)
        if inside >= limit or sum(self._inside.values()) >= self._capacity:
            return False
        self._inside[caller] = inside + 1
        return True

    async def _wait(self, caller: str, limit: int) -> None:
        self._make_room(caller)
        mine = (asyncio.get_running_loop().create_future(), limit)
        self._waiting.setdefault(caller, deque()).append(mine)
        telemetry.WAITING.inc()
        try:
            async with asyncio.timeout(self._patience):
                await mine[0]
        except TimeoutError:
            if _was_let_in(mine[0]):  # at the last moment
                return
            if self._inside.get(caller, 0) >= limit:
                message = f"this API key may have {limit} requests answered at the same time: try again later"
                raise _too_many(message, "concurrent_requests", 2) from None
            raise _overloaded() from None
        except asyncio.CancelledError:
            if _was_let_in(mine[0]):
                self._leave(caller)
            raise
        finally:
            telemetry.WAITING.dec()
            self._forget(caller, mine)

    def _make_room(self, caller: str) -> None:
        if sum(map(len, self._waiting.values())) < self._max_waiting:
            return
        greediest = max(self._waiting, key=lambda each: len(self._waiting[each]), default=caller)
        if len(self._waiting.get(greediest, ())) <= len(self._waiting.get(caller, ())) + 1:
            raise _overloaded()
        last, _ = self._waiting[greediest].pop()
        if not last.done():
            last.set_exception(_overloaded())

    def _leave(self, caller: str) -> None:
        self._inside[caller] -= 1
        if not self._inside[caller]:
            del self._inside[caller]
        for next_caller, waiting in list(self._waiting.items()):
            while waiting and waiting[0][0].done():
                waiting.popleft()
            if waiting and self._let_in(next_caller, waiting[0][1]):
                waiting.popleft()[0].set_result(None)
                self._waiting[next_caller] = self._waiting.pop(next_caller)  # to the end of the turns
                return

    def _forget(self, caller: str, mine: tuple[asyncio.Future[None], int]) -> None:
        waiting = self._waiting.get(caller)
        if waiting is not None:
            if mine in waiting:
                waiting.remove(mine)
            if not waiting:
                del self._waiting[caller]


def _was_let_in(turn: asyncio.Future[None]) -> bool:
    return turn.done() and not turn.cancelled() and turn.exception() is None


class Room:
    """Bytes of request bodies that may be held at the same time."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, count: int) -> None:
        """
        Raises:
            APIError: 503, there is no room.
        """
        if count > self._left:
            raise _overloaded()
        self._left -= count

    def give_back(self, count: int) -> None:
        self._left += count


def _too_many(message: str, limit: str, seconds: float) -> APIError:
    telemetry.REFUSED.labels(limit).inc()
    return APIError(429, message, type="rate_limit_error", code="rate_limit_exceeded", retry_after=seconds)


def _overloaded() -> APIError:
    telemetry.REFUSED.labels("capacity").inc()
    return APIError(
        503,
        "the gateway has more to do than it can: try again in a few seconds",
        type="server_error",
        code="overloaded",
    )
