"""`/v1/files`: training data comes in here."""

import asyncio
import hashlib
import tempfile
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Form, UploadFile

from basalt import api_files
from basalt.api_errors import bad_request, unavailable
from basalt.api_files import FileObject, file_object, safe_name
from basalt.object_store import ObjectStore, StoreUnavailable
from basalt.record.database import Sessions
from basalt.record.files import File
from basalt.record.jobs import new_id
from services.trainer.settings import Settings

CHUNK = 1 << 20  # bytes


def router(settings: Settings, sessions: Sessions, store: ObjectStore) -> APIRouter:
    routes = api_files.router(sessions, store, lambda: "")

    @routes.post("")
    async def create(file: UploadFile, purpose: Annotated[str, Form()]) -> FileObject:
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

    def _record(record: File) -> FileObject:
        with sessions.begin() as session:
            session.add(record)
            session.flush()
            session.refresh(record)
            return file_object(record)

    return routes


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
