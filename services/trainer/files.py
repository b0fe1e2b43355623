"""`/v1/files`: upload, list, retrieve, download, delete."""

import asyncio
import hashlib
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Form, Query, Response, UploadFile
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from basalt.api_errors import bad_request, unavailable
from basalt.api_lists import page
from basalt.object_store import ObjectStore, StoreUnavailable
from basalt.record.clock import now
from basalt.record.database import Sessions
from basalt.record.files import File, get_file, list_files
from basalt.record.jobs import new_id
from services.trainer.schema import file_object
from services.trainer.settings import Settings

CHUNK = 1 << 20  # bytes


def router(settings: Settings, sessions: Sessions, store: ObjectStore) -> APIRouter:
    routes = APIRouter(prefix="/v1/files")

    @routes.post("")
    async def create(file: UploadFile, purpose: Annotated[str, Form()]) -> dict[str, Any]:
        if purpose not in ("fine-tune", "evals", "vision", "user_data"):
            raise bad_request(f"'purpose' is 'fine-tune' for training data; {purpose[:40]!r} is not known", "purpose")
        digest, size = await asyncio.to_thread(_digest, file.file, settings.max_file_bytes)
        record = File(id=new_id("file"), filename=safe_name(file.filename), purpose=purpose, bytes=size, digest=digest)
        with tempfile.NamedTemporaryFile() as copy:
            await asyncio.to_thread(_copy, file.file, copy)
            try:
                await store.put_file(record.key, Path(copy.name))
            except StoreUnavailable:
                raise unavailable("object store") from None
        return await asyncio.to_thread(_record, record)

    def _record(record: File) -> dict[str, Any]:
        with sessions.begin() as session:
            session.add(record)
            session.flush()
            session.refresh(record)
            return file_object(record)

    @routes.get("")
    def list_all(
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10000)] = 100,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        with sessions() as session:
            found = list_files(session, purpose=purpose, after=after, limit=limit + 1, newest_first=order == "desc")
        return page([file_object(file) for file in found], limit)

    @routes.get("/{file_id}")
    def retrieve(file_id: str) -> dict[str, Any]:
        with sessions() as session:
            return file_object(get_file(session, file_id))

    @routes.get("/{file_id}/content")
    async def content(file_id: str) -> Response:
        with sessions() as session:
            file = get_file(session, file_id)
        path = Path(tempfile.mkstemp()[1])
        try:
            await store.get_file(file.key, path)
        except StoreUnavailable:
            raise unavailable("object store") from None
        return FileResponse(path, filename=file.filename, background=BackgroundTask(path.unlink))

    @routes.delete("/{file_id}")
    def delete(file_id: str) -> dict[str, Any]:
        """Its record says so; the bytes stay while a job may need them."""
        with sessions.begin() as session:
            get_file(session, file_id).deleted_at = now()  # type: ignore[assignment]
        return {"id": file_id, "object": "file", "deleted": True}

    return routes


def safe_name(name: str | None) -> str:
    """A name for a worker's folder, its ending kept: by it the format is known."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", Path(name or "").name).lstrip(".")
    return plain[-100:] or "file"


def _digest(file: BinaryIO, limit: int) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if size > limit:
            raise bad_request(f"the file is larger than {limit} bytes", "file", "file_too_large", status=413)
    if size == 0:
        raise bad_request("the file is empty", "file")
    file.seek(0)
    return f"sha256:{digest.hexdigest()}", size


def _copy(source: BinaryIO, target: Any) -> None:
    while chunk := source.read(CHUNK):
        target.write(chunk)
    target.flush()
