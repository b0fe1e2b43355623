"""A job's events as they come."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from basalt.record import jobs
from basalt.record.database import Sessions
from basalt.record.jobs import Event

POLL_SECONDS = 0.5


async def live(
    sessions: Sessions, job_id: str, number: int, shown: Callable[[Event], dict[str, Any]]
) -> AsyncIterator[str]:
    """Server-sent events: those from the one after `number` until the job has ended."""

    def new() -> tuple[list[Event], bool]:
        with sessions() as session:
            ended = jobs.get(session, job_id).status in jobs.ENDED
            return jobs.events_after(session, job_id, number, 100), ended

    while True:
        found, ended = await asyncio.to_thread(new)
        for event in found:
            number = event.number
            told = shown(event)
            yield f"id: {told['id']}\nevent: {event.type}\ndata: {json.dumps(told)}\n\n"
        if ended and not found:
            yield "event: done\ndata: [DONE]\n\n"
            return
        if not found:
            yield ": \n\n"  # so that a client that has gone is noticed
        await asyncio.sleep(POLL_SECONDS)
