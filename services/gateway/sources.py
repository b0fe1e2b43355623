"""Where a request's images come from: URLs, files that were uploaded, and what earlier responses kept."""

from basalt.api_errors import bad_request, unavailable
from basalt.auth import Caller
from basalt.breaker import Broken
from basalt.object_store import ObjectNotFound, image_key
from basalt.record.files import NoSuchFile, get_file
from basalt.record.reader import Reader
from services.gateway.images import ImageIntake, StoredImage
from services.gateway.schema import Source


class Sources:
    """Takes an image from wherever a request says it is."""

    def __init__(self, record: Reader, images: ImageIntake) -> None:
        self._record, self._images = record, images

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

    async def _file(self, file_id: str, param: str, caller: Caller) -> StoredImage:
        try:
            file = await self._record.read(lambda session: get_file(session, file_id, caller.id))
        except NoSuchFile as error:
            raise bad_request(str(error), param, "not_found", status=404) from None
        except Broken as error:
            raise unavailable("state of record") from error
        try:
            data = await self._images.read(file.key)
        except ObjectNotFound:
            raise bad_request(
                f"the bytes of file {file_id!r} are gone: upload it again", param, "not_found", 404
            ) from None
        return await self._images.keep(data, param)  # where the copy that requests use was removed by its age

    async def _kept(self, image_id: str, param: str) -> StoredImage:
        key = image_key(image_id)
        try:
            return StoredImage(image_id, key, await self._images.read(key))
        except ObjectNotFound:
            raise bad_request(
                "an image of the conversation so far is no longer kept: show it again", param, "image_expired"
            ) from None
