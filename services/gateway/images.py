"""An image part's way in: fetched or decoded, checked by its content, kept in the object store."""

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from basalt.api_errors import bad_request, unavailable
from basalt.assistants import sha256
from basalt.auth import Caller
from basalt.breaker import Breaker, Broken
from basalt.caching import ByteLRU
from basalt.data.images import ImageError
from basalt.flights import SingleFlight
from basalt.object_store import ObjectStore, StoreUnavailable, image_key
from services.gateway import telemetry
from services.gateway.decoding import Decoders
from services.gateway.fetch import CachedFetcher, FetchError, TooLarge
from services.gateway.limits import Limits
from services.gateway.settings import Settings

T = TypeVar("T")

PAUSE_SECONDS = 2.0  # without asking an object store that did not answer
STORED_SECONDS = 600.0  # that an image which was stored is taken to be there
MAX_REMEMBERED = 100_000  # of those
SMALL = 128 * 1024  # bytes

_DATA_URL = re.compile(r"data:[^,]{0,200};base64", re.IGNORECASE)


@dataclass(frozen=True)
class StoredImage:
    """An image that has been checked and stands in the object store under `key`."""

    id: str  # sha256:…
    key: str
    data: bytes


class ImageIntake:
    """Takes images by URL. `close` at the end."""

    def __init__(
        self, fetcher: CachedFetcher, decoders: Decoders, limits: Limits, store: ObjectStore, settings: Settings
    ) -> None:
        self._fetcher = fetcher
        self._decoders = decoders
        self._limits = limits
        self._store = store
        self._max_bytes = settings.max_image_bytes
        self._max_pixels = settings.max_pixels
        self._store_seconds = settings.store_seconds
        self._asking = Breaker("object store", (StoreUnavailable,), PAUSE_SECONDS)
        self._stored: ByteLRU[str, float] = ByteLRU(MAX_REMEMBERED)  # until when what is stored is not asked for
        self._storing: SingleFlight[str, None] = SingleFlight()
        self._threads = ThreadPoolExecutor(2, "images")

    async def close(self) -> None:
        await self._fetcher.close()
        await self._decoders.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def take(self, url: str, param: str, caller: Caller) -> StoredImage:
        """The image behind an http(s) or data: URL.

        Raises:
            APIError: 400 not fetched or not an image, 413 too large, 429 too many fetches, 503 the object store is
                down.
        """
        if url[:5].lower() == "data:":
            telemetry.IMAGES.labels("data").inc()
            data = await self._off_loop(len(url), self._decode_data_url, url, param)
        else:
            telemetry.IMAGES.labels("url").inc()
            data = self._fetcher.cached(url) or await self._fetch(url, param, caller)
        return await self.keep(data, param)

    async def keep(self, data: bytes, param: str) -> StoredImage:
        """An image by its bytes.

        Raises:
            APIError: 400 not an image, 413 too large, 503 the object store is down.
        """
        if len(data) > self._max_bytes:
            raise self._too_large(param)
        image_id = await self._off_loop(len(data), sha256, data)
        key = image_key(image_id)
        try:
            if time.monotonic() >= (self._stored.get(image_id) or 0.0):
                await self._storing.run(image_id, lambda: self._check_and_store(key, data))
                self._stored.put(image_id, time.monotonic() + STORED_SECONDS, 1)
        except ImageError as error:
            raise bad_request(str(error), param, "invalid_image") from None
        except Broken as error:
            raise unavailable("object store") from error
        return StoredImage(image_id, key, data)

    async def read(self, key: str) -> bytes:
        """What stands in the object store under a key.

        Raises:
            ObjectNotFound.
            APIError: 503 the object store is down.
        """
        try:
            return await self._ask_store(lambda: self._store.get(key))
        except Broken as error:
            raise unavailable("object store") from error

    async def _check_and_store(self, key: str, data: bytes) -> None:
        """What is stored was checked when it was stored: images of earlier turns come again and again."""
        with telemetry.stage("store"):
            there = await self._ask_store(lambda: self._store.exists(key))
        if there:
            return
        with telemetry.stage("decode"):
            await self._decoders.check(data, self._max_pixels)
        with telemetry.stage("store"):
            await self._ask_store(lambda: self._store.put(key, data))

    async def _ask_store(self, call: Callable[[], Awaitable[T]]) -> T:
        return await self._asking.run(call, self._store_seconds)

    async def _fetch(self, url: str, param: str, caller: Caller) -> bytes:
        await self._limits.fetch(caller)
        try:
            with telemetry.stage("fetch"):
                return await self._fetcher.get(url)
        except TooLarge as error:
            raise bad_request(f"the image is too large: {error}", param, "image_too_large", 413) from None
        except FetchError as error:
            raise bad_request(f"the image could not be fetched: {error}", param, "image_not_fetched") from None

    def _decode_data_url(self, url: str, param: str) -> bytes:
        head, comma, payload = url.partition(",")
        if not comma or not _DATA_URL.fullmatch(head):
            raise bad_request("a data: URL must read data:image/…;base64,…", param, "invalid_data_url")
        if len(payload) * 3 // 4 > self._max_bytes + 2:
            raise self._too_large(param)
        try:
            data = base64.b64decode(payload.encode("ascii"), validate=True)
        except (binascii.Error, ValueError):
            raise bad_request(
                "the data: URL does not hold valid base64 (A-Z a-z 0-9 + / and = at the end)", param, "invalid_data_url"
            ) from None
        return data

    def _too_large(self, param: str):
        return bad_request(
            f"the image is too large: it has more than {self._max_bytes:,} bytes", param, "image_too_large", 413
        )

    async def _off_loop(self, size: int, function: Callable[..., T], *arguments: object) -> T:
        """In a thread, unless there is so little to do that going there takes longer."""
        if size < SMALL:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
