"""Embeddings in Redis, for all replicas of the vision service: a byte budget, the least recently used going first.

It is a help and no need: a Redis that is gone or does not answer costs one short wait, then nothing for a while.
"""

import logging
import time

import redis.asyncio
from redis.exceptions import RedisError

from basalt.handoff import Blob

log = logging.getLogger("basalt.vision")

ANSWER_SECONDS = 0.2  # for Redis to answer; computing an image anew takes about as long
PAUSE_SECONDS = 5.0  # without asking again
VALUES = "basalt:embeddings:"  # + digest: the blob
USED, SIZES, TOTAL = "basalt:embeddings-used", "basalt:embeddings-sizes", "basalt:embeddings-bytes"

# Keys: the value, USED, SIZES, TOTAL. Arguments: the digest, now, the blob, the budget, the values' prefix.
PUT = """
local size = string.len(ARGV[3])
if size > tonumber(ARGV[4]) then return 0 end
redis.call('INCRBY', KEYS[4], size - tonumber(redis.call('HGET', KEYS[3], ARGV[1]) or 0))
redis.call('HSET', KEYS[3], ARGV[1], size)
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
redis.call('SET', KEYS[1], ARGV[3])
while tonumber(redis.call('GET', KEYS[4])) > tonumber(ARGV[4]) do
  local oldest = redis.call('ZPOPMIN', KEYS[2])[1]
  redis.call('DEL', ARGV[5] .. oldest)
  redis.call('DECRBY', KEYS[4], redis.call('HGET', KEYS[3], oldest))
  redis.call('HDEL', KEYS[3], oldest)
end
return 1
"""
GET = """
local value = redis.call('GET', KEYS[1])
if value then redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1]) end
return value
"""


class SharedCache:
    """Blobs by digest. Use from one event loop; `close` at the end.

    Args:
        url: of Redis.
        budget: bytes of blobs that may lie there.
    """

    def __init__(self, url: str, budget: int) -> None:
        self._budget = budget
        self._paused_until = 0.0
        self._redis = redis.asyncio.from_url(
            url, socket_timeout=ANSWER_SECONDS, socket_connect_timeout=ANSWER_SECONDS, retry=None
        )
        self._get = self._redis.register_script(GET)
        self._put = self._redis.register_script(PUT)

    async def close(self) -> None:
        await self._redis.aclose()

    async def get(self, digest: str) -> Blob | None:
        found = await self._ask(self._get, [VALUES + digest, USED], [digest, time.time()])
        try:
            return Blob.parse(found) if isinstance(found, bytes) else None
        except ValueError as error:
            log.warning("Redis holds %s: %s", digest, error)
            return None

    async def put(self, digest: str, blob: Blob) -> None:
        value = blob.header() + bytes(blob.data)
        arguments = [digest, time.time(), value, self._budget, VALUES]
        await self._ask(self._put, [VALUES + digest, USED, SIZES, TOTAL], arguments)

    async def _ask(self, script, keys: list[str], arguments: list[object]) -> object:
        if time.monotonic() < self._paused_until:
            return None
        try:
            return await script(keys=keys, args=arguments)
        except (RedisError, OSError, TimeoutError) as error:
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            log.warning("Redis: %s; going on without it for %g s", error, PAUSE_SECONDS)
            return None
