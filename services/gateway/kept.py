"""The responses that the gateway keeps for its clients; their images are in the object store."""

import asyncio
import base64
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from basalt.api_errors import APIError, bad_request, unavailable
from basalt.auth import Caller
from basalt.object_store import ObjectNotFound, ObjectStore, StoreError, image_key
from basalt.record.database import Sessions
from basalt.record.responses import (
    KeptResponse,
    NoSuchResponse,
    conversation,
    delete_response,
    get_response,
    keep_longer,
    keep_response,
)
from services.gateway.response_items import PREVIOUS, Item, images_of, item_id, place_of, said

T = TypeVar("T")

RECORD_SECONDS = 5.0  # for the state of record to answer

log = logging.getLogger("basalt.gateway")


class Kept:
    """Each caller's own."""

    def __init__(self, sessions: Sessions, store: ObjectStore, days: float) -> None:
        self._sessions, self._store, self._days = sessions, store, days

    async def get(self, response_id: str, caller: Caller) -> dict[str, Any]:
        """A response as it was told.

        Raises:
            NoSuchResponse.
            APIError: 503, as of all that follow.
        """
        return (await self._ask(self._get, response_id, caller)).body

    async def delete(self, response_id: str, caller: Caller) -> None:
        """
        Raises:
            NoSuchResponse.
        """
        await self._ask(self._delete, response_id, caller)

    async def conversation(self, previous: str | None, caller: Caller) -> list[KeptResponse]:
        """What is gone on from, the first response first.

        Raises:
            APIError: 400 it is not there.
        """
        if previous is None:
            return []
        try:
            return await self._ask(self._turns, previous, caller)
        except NoSuchResponse as error:
            raise bad_request(str(error), PREVIOUS, "previous_response_not_found") from None

    async def resolved(self, items: list[Item], caller: Caller) -> list[Item]:
        """The items with those in place that were only referred to.

        Raises:
            NoSuchResponse.
            APIError: 404.
        """
        if all(item["type"] != "item_reference" for item in items):
            return items
        return await self._ask(self._resolved, items, caller)

    async def keep(
        self, response: dict[str, Any], items: list[Item], caller: Caller, earlier: list[KeptResponse]
    ) -> bool:
        """Whether it could be kept: an answer that was given is told all the same."""
        row = KeptResponse(
            id=response["id"], owner=caller.id, previous_id=response[PREVIOUS], body=response, input=items
        )
        try:
            await self._ask(self._keep, row, earlier)
        except APIError:
            return False
        return True

    async def items_before(self, response_id: str, caller: Caller) -> list[Item]:
        """The items that a response is an answer to, each with its id.

        Raises:
            NoSuchResponse.
        """
        *earlier, last = await self._ask(self._turns, response_id, caller)
        items = [item for turn in earlier for item in self._items(turn)]
        return items + self._items(last)[: len(last.input)]

    async def show_images(self, items: list[Item], whole: bool) -> None:
        """Items as they are shown: images by their URLs where those are asked for."""
        for part in images_of(items):
            image_id = part.pop("image", None)
            url = part.pop("image_url", None)
            part["image_url"] = (url or await self._data_url(image_id)) if whole else None
            part.setdefault("file_id", None)

    async def _data_url(self, image_id: str) -> str | None:
        try:
            data = await self._store.get(image_key(image_id))
        except ObjectNotFound:
            return None
        except StoreError as error:
            raise unavailable("object store") from error
        return f"data:image/*;base64,{base64.b64encode(data).decode()}"

    async def _ask(self, query: Callable[..., T], *arguments: Any) -> T:
        """
        Raises:
            APIError: 503, the state of record failed or did not answer in time.
        """
        try:
            async with asyncio.timeout(RECORD_SECONDS):
                return await asyncio.to_thread(query, *arguments)
        except (SQLAlchemyError, TimeoutError) as error:
            log.warning("the state of record: %s", type(error).__name__)
            raise unavailable("state of record") from error

    def _get(self, response_id: str, caller: Caller) -> KeptResponse:
        with self._sessions() as session:
            return get_response(session, response_id, caller.id)

    def _delete(self, response_id: str, caller: Caller) -> None:
        with self._sessions.begin() as session:
            delete_response(session, response_id, caller.id)

    def _turns(self, response_id: str, caller: Caller) -> list[KeptResponse]:
        with self._sessions() as session:
            return conversation(session, response_id, caller.id)

    def _keep(self, row: KeptResponse, earlier: list[KeptResponse]) -> None:
        with self._sessions.begin() as session:
            keep_response(session, row, self._days)
            keep_longer(session, earlier, self._days)

    def _resolved(self, items: list[Item], caller: Caller) -> list[Item]:
        return [self._item(item["id"], caller) if item["type"] == "item_reference" else item for item in items]

    def _item(self, name: str, caller: Caller) -> Item:
        response_id, index = place_of(name)
        turn = self._get(response_id, caller)
        items = turn.input + said(turn.body["output"])
        if index >= len(items):
            raise bad_request(f"there is no item {name[:100]!r}", "input", "not_found", 404)
        return items[index]

    @staticmethod
    def _items(turn: KeptResponse) -> list[Item]:
        given = [
            {"id": item_id(item["type"], turn.id, index), "status": "completed", **item}
            for index, item in enumerate(turn.input)
        ]
        return given + turn.body["output"]
