"""An image part's way in: fetched or decoded, checked by its content, kept in the object store."""

import asyncio
import base64
import binascii
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from basalt.api_errors import bad_request, unavailable
from basalt.assistants import sha256
from basalt.auth import Caller
from basalt.data.images import ImageError, decode_image
from basalt.object_store import ObjectStore, StoreError, image_key
from services.gateway import telemetry
from services.gateway.fetch import Fetcher, FetchError, TooLarge
from services.gateway.limits import Limits

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
        self, fetcher: Fetcher, limits: Limits, store: ObjectStore, *, max_bytes: int, max_pixels: int
    ) -> None:
        self._fetcher = fetcher
        self._limits = limits
        self._store = store
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
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
        try:
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
