"""The responses that the gateway keeps for its clients; their images are in the object store."""

import asyncio
import base64
import logging
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from basalt.api_errors import bad_request, unavailable
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

log = logging.getLogger("basalt.gateway")


class Kept:
    """Each caller's own."""

    def __init__(self, sessions: Sessions, store: ObjectStore, days: float) -> None:
        self._sessions, self._store, self._days = sessions, store, days

    def get(self, response_id: str, caller: Caller) -> KeptResponse:
        """
        Raises:
            NoSuchResponse.
        """
        with self._sessions() as session:
            return get_response(session, response_id, caller.id)

    def delete(self, response_id: str, caller: Caller) -> None:
        """
        Raises:
            NoSuchResponse.
        """
        with self._sessions.begin() as session:
            delete_response(session, response_id, caller.id)

    async def conversation(self, previous: str | None, caller: Caller) -> list[KeptResponse]:
        """What is gone on from, the first response first.

        Raises:
            APIError: 400 it is not there, 503.
        """
        if previous is None:
            return []
        try:
            return await asyncio.to_thread(self._turns, previous, caller)
        except NoSuchResponse as error:
            raise bad_request(str(error), PREVIOUS, "previous_response_not_found") from None
        except SQLAlchemyError as error:
            raise unavailable("state of record") from error

    async def resolved(self, items: list[Item], caller: Caller) -> list[Item]:
        """The items with those in place that were only referred to.

        Raises:
            APIError: 404, 503.
        """
        if all(item["type"] != "item_reference" for item in items):
            return items
        return await asyncio.to_thread(self._resolved, items, caller)

    async def keep(
        self, response: dict[str, Any], items: list[Item], caller: Caller, earlier: list[KeptResponse]
    ) -> bool:
        """Whether it could be kept: an answer that was given is told all the same."""
        row = KeptResponse(
            id=response["id"], owner=caller.id, previous_id=response[PREVIOUS], body=response, input=items
        )
        try:
            await asyncio.to_thread(self._keep, row, earlier)
        except SQLAlchemyError as error:
            log.warning("a response could not be stored: %s", type(error).__name__)
            return False
        return True

    def items_before(self, response_id: str, caller: Caller) -> list[Item]:
        """The items that a response is an answer to, each with its id.

        Raises:
            NoSuchResponse.
        """
        *earlier, last = self._turns(response_id, caller)
        items = [item for turn in earlier for item in self._items(turn)]
        return items + self._items(last)[: len(last.input)]

    async def show_images(self, items: list[Item], whole: bool) -> None:
        """Items as they are shown: images by their URLs where those are asked for.

        Raises:
            APIError: 503.
        """
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
        turn = self.get(response_id, caller)
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
