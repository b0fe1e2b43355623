"""`/v1/files`: images that requests may name by `file_id`. Each is its uploader's alone."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from basalt import api_files
from basalt.api_errors import bad_request, unavailable
from basalt.api_files import FileObject, file_object, safe_name
from basalt.auth import Caller, Guard
from basalt.object_store import ObjectStore, StoreError
from basalt.record.database import Sessions
from basalt.record.files import File
from basalt.record.jobs import new_id
from services.gateway import telemetry
from services.gateway.chat import Services, read_body, while_connected

PURPOSES = ("vision", "user_data")


def router(guard: Guard, sessions: Sessions, store: ObjectStore) -> APIRouter:
    async def owner(caller: Annotated[Caller, Depends(guard)]) -> str:
        return caller.id

    routes = api_files.router(sessions, store, owner)

    @routes.post("", response_model=FileObject)
    async def upload(request: Request, caller: Annotated[Caller, Depends(guard)]) -> Response:
        """Keeps an image: JPEG, PNG, WebP or GIF, whatever its name says."""
        services: Services = request.app.state.services
        telemetry.record().caller = caller.id
        await services.limits.ask(caller)
        form = await _form(request, await read_body(request, services))
        file, purpose = form.get("file"), form.get("purpose")
        if purpose not in PURPOSES:
            raise bad_request(
                f"'purpose' is {' or '.join(PURPOSES)} here; training data goes to the trainer's /v1/files", "purpose"
            )
        if not isinstance(file, UploadFile):
            raise bad_request("'file' must be a file's bytes, with a filename", "file")
        return await while_connected(request, keep(services, caller, file, str(purpose)))

    async def keep(services: Services, caller: Caller, file: UploadFile, purpose: str) -> Response:
        data = await file.read()
        image = await services.images.keep(data, "file")
        record = File(
            id=new_id("file"),
            owner=caller.id,
            filename=safe_name(file.filename),
            purpose=purpose,
            bytes=len(data),
            digest=image.id,
        )
        try:
            await store.put(record.key, data)  # a copy of its own: it is kept until it is deleted
        except StoreError as error:
            raise unavailable("object store") from error
        return JSONResponse((await asyncio.to_thread(add, record)).model_dump())

    def add(record: File) -> FileObject:
        with sessions.begin() as session:
            session.add(record)
            session.flush()
            session.refresh(record)
            return file_object(record)

    return routes


async def _form(request: Request, body: bytes) -> FormData:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise bad_request("send a form: Content-Type: multipart/form-data, with 'file' and 'purpose'")
    try:
        return await MultiPartParser(request.headers, once(), max_files=1, max_fields=10).parse()
    except MultiPartException as error:
        raise bad_request(f"the form cannot be read: {error.message}") from None
    except (KeyError, UnicodeDecodeError, ValueError):  # no boundary, or names that are no text
        raise bad_request("the form cannot be read: its parts are broken") from None
