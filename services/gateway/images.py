"""An image part's way in: fetched or decoded, checked by its content, kept in the object store."""

import asyncio
import base64
import binascii
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from basalt.api_errors import bad_request, unavailable
from basalt.assistants import sha256
from basalt.auth import Caller
from basalt.caching import ByteLRU
from basalt.data.images import ImageError, decode_image
from basalt.flights import SingleFlight
from basalt.object_store import ObjectStore, StoreError, image_key
from services.gateway import telemetry
from services.gateway.fetch import Fetcher, FetchError, TooLarge
from services.gateway.limits import Limits
from services.gateway.settings import Settings

_DATA_URL = re.compile(r"data:[^,]{0,200};base64", re.IGNORECASE)


@dataclass(frozen=True)
class StoredImage:
    """An image that has been checked and stands in the object store under `key`."""

    id: str  # sha256:…
    key: str
    data: bytes


class ImageIntake:
    """Takes images by URL. `close` at the end."""

    def __init__(self, fetcher: Fetcher, limits: Limits, store: ObjectStore, settings: Settings) -> None:
        self._fetcher = fetcher
        self._limits = limits
        self._store = store
        self._max_bytes = settings.max_image_bytes
        self._max_pixels = settings.max_pixels
        self._fresh_seconds = settings.fetched_fresh_seconds
        self._fetching: SingleFlight[str, bytes] = SingleFlight()
        self._fetched: ByteLRU[str, tuple[bytes, float]] = ByteLRU(settings.fetched_cache_bytes)  # and until when
        self._threads = ThreadPoolExecutor(2, "images")

    async def close(self) -> None:
        await self._fetcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def take(self, url: str, param: str, caller: Caller) -> StoredImage:
        """The image behind an http(s) or data: URL.

        Raises:
            APIError: 400 not fetched or not an image, 413 too large, 429 too many fetches, 503 the object store is
                down.
        """
        if url[:5].lower() == "data:":
            data = await self._run(self._decode_data_url, url, param)
        else:
            await self._limits.fetch(caller)
            with telemetry.stage("fetch"):
                data = await self._fetch(url, param)
        return await self.keep(data, param)

    async def keep(self, data: bytes, param: str) -> StoredImage:
        """An image by its bytes.

        Raises:
            APIError: 400 not an image, 503 the object store is down.
        """
        image_id = await self._run(sha256, data)
        key = image_key(image_id)
        try:
            # What is stored was checked when it was stored: images of earlier turns come again and again.
            if not await self._store.exists(key):
                with telemetry.stage("decode"):
                    await self._check(data, param)
                with telemetry.stage("store"):
                    await self._store.put(key, data)
        except StoreError as error:
            raise unavailable("object store") from error
        return StoredImage(image_id, key, data)

    async def _fetch(self, url: str, param: str) -> bytes:
        """Once for all that ask at the same time, and for a while after."""
        data, until = self._fetched.get(url) or (b"", 0.0)
        if time.monotonic() < until:
            telemetry.FETCHES.labels("cached").inc()
            return data
        try:
            data = await self._fetching.run(url, lambda: self._fetcher.get(url))
            telemetry.FETCHES.labels("fetched").inc()
            self._fetched.put(url, (data, time.monotonic() + self._fresh_seconds), len(data))
            return data
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
        if len(data) > self._max_bytes:
            raise self._too_large(param)
        return data

    async def _check(self, data: bytes, param: str) -> None:
        try:
            await self._run(lambda: decode_image(data, max_pixels=self._max_pixels))
        except ImageError as error:
            raise bad_request(str(error), param, "invalid_image") from None

    def _too_large(self, param: str):
        return bad_request(
            f"the image is too large: it has more than {self._max_bytes:,} bytes", param, "image_too_large", 413
        )

    async def _run(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
