"""Where a request's images come from: URLs, files that were uploaded, and what earlier responses kept."""

import asyncio
import base64

from sqlalchemy.exc import SQLAlchemyError

from basalt.api_errors import bad_request, unavailable
from basalt.auth import Caller
from basalt.object_store import ObjectNotFound, ObjectStore, StoreError, image_key
from basalt.record.database import Sessions
from basalt.record.files import File, NoSuchFile, get_file
from services.gateway.images import ImageIntake, StoredImage
from services.gateway.schema import Source


class Sources:
    """Takes an image from wherever a request says it is."""

    def __init__(self, sessions: Sessions, store: ObjectStore, images: ImageIntake, max_bytes: int) -> None:
        self._sessions, self._store, self._images, self._max_bytes = sessions, store, images, max_bytes

    async def take(self, source: Source, param: str, caller: Caller) -> StoredImage:
        """
        Raises:
            APIError: 400 no image there, 404 no such file of this caller's, 413 too large, 429, 503.
        """
        match source.kind:
            case "url":
                return await self._images.take(source.name, param, caller)
            case "file":
                return await self._file(source.name, param, caller)
            case "kept":
                return await self._kept(source.name, param)

    async def take_bytes(self, data: bytes, param: str, caller: Caller) -> StoredImage:
        """An image as it was uploaded.

        Raises:
            APIError: see `take`.
        """
        if len(data) > self._max_bytes:
            raise self._too_large(param)
        return await self._images.take(f"data:;base64,{base64.b64encode(data).decode()}", param, caller)

    async def _file(self, file_id: str, param: str, caller: Caller) -> StoredImage:
        try:
            file = await asyncio.to_thread(self._find, file_id, caller)
        except NoSuchFile as error:
            raise bad_request(str(error), param, "not_found", status=404) from None
        except SQLAlchemyError as error:
            raise unavailable("state of record") from error
        if file.bytes > self._max_bytes:
            raise self._too_large(param)
        try:
            key = image_key(file.digest)
            if await self._store.exists(key):
                return StoredImage(file.digest, key, await self._store.get(key))
            data = await self._store.get(file.key)
        except StoreError as error:
            raise unavailable("object store") from error
        return await self.take_bytes(data, param, caller)

    async def _kept(self, image_id: str, param: str) -> StoredImage:
        key = image_key(image_id)
        try:
            return StoredImage(image_id, key, await self._store.get(key))
        except ObjectNotFound:
            raise bad_request(
                "an image of the conversation so far is no longer kept: show it again", param, "image_expired"
            ) from None
        except StoreError as error:
            raise unavailable("object store") from error

    def _find(self, file_id: str, caller: Caller) -> File:
        with self._sessions() as session:
            return get_file(session, file_id, caller.id)

    def _too_large(self, param: str):
        return bad_request(
            f"the image is too large: it has more than {self._max_bytes:,} bytes", param, "image_too_large", 413
        )
