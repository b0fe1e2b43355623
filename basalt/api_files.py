"""OpenAI's files as a service shows them: list, retrieve, download, delete. Uploading is each service's own."""

import asyncio
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.background import BackgroundTask

from basalt.api_errors import unavailable
from basalt.api_lists import page
from basalt.object_store import ObjectStore, StoreError
from basalt.record.clock import now
from basalt.record.database import Sessions
from basalt.record.files import File, get_file, list_files


class FileObject(BaseModel):
    """OpenAI's file object."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def router(sessions: Sessions, store: ObjectStore, owner: Callable[..., Any]) -> APIRouter:
    """The routes below `/v1/files`.

    Args:
        owner: a FastAPI dependency that tells whose files a request may see. Raises NoSuchFile for others'.
    """
    routes = APIRouter(prefix="/v1/files", tags=["files"])

    @routes.get("")
    def list_all(
        owner: Annotated[str, Depends(owner)],
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10000)] = 100,
        order: Literal["asc", "desc"] = "desc",
    ) -> FileList:
        """Newest first, a page at a time."""
        with sessions() as session:
            found = list_files(
                session, owner, purpose=purpose, after=after, limit=limit + 1, newest_first=order == "desc"
            )
        return FileList.model_validate(page([file_object(file).model_dump() for file in found], limit))

    @routes.get("/{file_id}")
    def retrieve(file_id: str, owner: Annotated[str, Depends(owner)]) -> FileObject:
        return file_object(find(file_id, owner))

    @routes.get("/{file_id}/content", response_class=FileResponse)
    async def content(file_id: str, owner: Annotated[str, Depends(owner)]) -> Response:
        """Its bytes as they were uploaded."""
        file = await asyncio.to_thread(find, file_id, owner)
        handle, name = tempfile.mkstemp()
        os.close(handle)
        path = Path(name)
        try:
            await store.get_file(file.key, path)
        except StoreError:
            path.unlink()  # noqa: ASYNC240 (an empty file)
            raise unavailable("object store") from None
        headers = {"X-Content-Type-Options": "nosniff"}  # whatever it is, nobody's browser is to show it
        octets = "application/octet-stream"
        return FileResponse(path, 200, headers, octets, BackgroundTask(path.unlink), file.filename)

    def find(file_id: str, owner: str) -> File:
        with sessions() as session:
            return get_file(session, file_id, owner)

    @routes.delete("/{file_id}")
    def delete(file_id: str, owner: Annotated[str, Depends(owner)]) -> FileDeleted:
        """Its record says so; the bytes stay while a job may need them."""
        with sessions.begin() as session:
            get_file(session, file_id, owner).deleted_at = now()  # type: ignore[assignment]
        return FileDeleted(id=file_id)

    return routes


def file_object(file: File) -> FileObject:
    return FileObject(
        id=file.id, bytes=file.bytes, created_at=int(file.created_at), filename=file.filename, purpose=file.purpose
    )


def safe_name(name: str | None) -> str:
    """A name for a worker's folder, its ending kept: by it the format is known."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", Path(name or "").name).lstrip(".")
    return plain[-100:] or "file"
