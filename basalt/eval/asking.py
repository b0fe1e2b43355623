"""Asks an endpoint many questions, keeping every answer as it comes: what is kept is never asked again.

An answer is found by the digest of all it depends on: the messages with the digests of their images, the decoding,
and the model with its version and system fingerprint. It counts once it is on disk. What brought no answer is a state
of its own and is asked again by the next run.
"""

import asyncio
import base64
import hashlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image
from sqlalchemy.orm import Session, sessionmaker

from basalt.data.readers import DataError
from basalt.eval.endpoint import AskError, Endpoint, Reply, Served, Trouble, chat, encode, version_of
from basalt.eval.pace import Pace
from basalt.record.answers import Answer, find_answers, keep_answers, key_of

State = Literal["answered", "failed", "bad image", "not asked"]
Messages = list[dict[str, Any]]

AHEAD = 16  # questions made ready before their turn
LONGEST_BACK_OFF = 30.0  # seconds
LONGEST_WAIT = 300.0  # seconds that a server's wish to wait is granted
UNREADABLE = (DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # Pillow's, of bad images
WATCH = 0.2  # seconds between looks whether to stop


@dataclass(frozen=True)
class Question:
    """What is asked. `messages` makes them when it is their turn; `run` tells apart equal questions to be asked anew.

    `messages` may raise DataError or OSError for an image that cannot be read.
    """

    id: str
    messages: Callable[[], Messages]
    run: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a question: an answer, or the kind of trouble and the words for it."""

    state: State
    answer: Answer | None = None
    trouble: str = ""
    message: str = ""
    key: str = ""  # of the answer, had or not


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    prompt: float
    completion: float


@dataclass(frozen=True)
class Limits:
    """How hard an endpoint is tried.

    Args:
        concurrency: requests under way at most; how many there are is found out.
        attempts: for one question.
        patience: questions given up in a row, none answered between, after which the rest are not asked.
    """

    concurrency: int = 128
    attempts: int = 5
    patience: int = 8


LIMITS = Limits()


@dataclass
class Progress:
    """How a run stands. Tokens are of the answers asked for now, not of those that were kept."""

    total: int
    kept: int = 0  # answers there were already
    asked: int = 0  # answers that this run brought
    failed: int = 0
    limit: int = 0  # requests at once, the best number found so far
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0  # answers whose tokens the server did not tell
    cost: float | None = None  # dollars, where the price is known
    troubles: Counter[str] = field(default_factory=Counter)  # by kind, of every request, answered later or not

    @property
    def done(self) -> int:
        return self.kept + self.asked + self.failed

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "troubles": dict(self.troubles)}

    def add(self, other: "Progress") -> None:
        """Counts what another asking brought and cost besides."""
        for name in ("kept", "asked", "failed", "seconds", "prompt_tokens", "completion_tokens", "uncounted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.cost = other.cost if self.cost is None else self.cost + (other.cost or 0.0)
        self.troubles += other.troubles
        self.limit = other.limit


@dataclass(frozen=True)
class Asked:
    """All outcomes, in the order of the questions, with who answered and how it went."""

    outcomes: dict[str, Outcome]
    served: Served
    progress: Progress
    stopped: str = ""  # why not every question was asked


class Asker:
    """Asks one endpoint. `async with Asker(…).open() as asker: await asker.ask(questions)`

    Args:
        decoding: the fields of a chat request that say how to decode, as `{"temperature": 0, "max_tokens": 128}`.
        stop: asked now and then; when it says so nothing more is asked.
        tell: is given the progress at every change.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        decoding: dict[str, Any],
        sessions: sessionmaker[Session],
        *,
        limits: Limits = LIMITS,
        price: Price | None = None,
        stop: Callable[[], bool] = lambda: False,
        tell: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.endpoint, self.decoding, self.limits, self.price = endpoint, decoding, limits, price
        self.pace = Pace(limits.concurrency)
        self._stop, self._tell = stop, tell
        self._shelf = Shelf(sessions)

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Asker"]:
        """Connects and finds out who answers.

        Raises:
            AskError: the endpoint cannot be asked.
        """
        async with self.endpoint.client(self.limits.concurrency) as self._client:
            self.served = await self._who()
            yield self

    async def ask(self, questions: Sequence[Question]) -> Asked:
        """Asks what is not known yet. Equal questions are asked once.

        Raises:
            SQLAlchemyError: the answers cannot be kept.
        """
        run = _Run(self, questions)
        stopped = await run.outcome()
        outcomes = {question.id: run.outcomes.get(question.id, Outcome("not asked")) for question in questions}
        return Asked(outcomes, self.served, run.progress, stopped)

    def request(self, messages: Messages, run: int) -> dict[str, Any]:
        """All that an answer depends on."""
        return {
            "messages": _with_image_ids(messages),
            "decoding": self.decoding,
            "model": self.served.model,
            "version": self.served.version,
            "fingerprint": self.served.fingerprint,
            "run": run,
        }

    async def send(self, body: bytes, troubles: Counter[str]) -> tuple[Reply, float]:
        """One answer and the seconds it took, with as many attempts as there may be.

        Raises:
            Trouble: the last one's.
        """
        for attempt in range(1, self.limits.attempts + 1):
            entered = await self.pace.enter()
            try:
                reply = await chat(self._client, body, self.endpoint.seconds)
                self.pace.answered()
                return reply, time.monotonic() - entered
            except Trouble as trouble:
                troubles[trouble.kind] += 1
                if trouble.busy:
                    self.pace.push_back(entered, min(trouble.wait, LONGEST_WAIT))
                if not trouble.again or attempt == self.limits.attempts:
                    raise
            finally:
                await self.pace.leave()
            await asyncio.sleep(random.uniform(0, min(LONGEST_BACK_OFF, 0.5 * 2**attempt)))
        raise AssertionError("no attempt was allowed")

    async def _who(self) -> Served:
        """The model, its version, and the fingerprint that the server gives with a short answer."""
        version = await version_of(self._client, self.endpoint)
        hello = encode(self.endpoint.model, [{"role": "user", "content": "Hello!"}], self.decoding)
        try:
            reply, _ = await self.send(hello, Counter())
        except Trouble as trouble:
            raise AskError(f"{self.endpoint.model} at {self.endpoint.url} answers nothing: {trouble}") from trouble
        return Served(self.endpoint.model, version, reply.fingerprint)


class Shelf:
    """The kept answers. Those that come while others are being written are written together."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._waiting: list[tuple[Answer, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    def find(self, keys: Sequence[str]) -> dict[str, Answer]:
        with self._sessions() as session:
            return find_answers(session, keys)

    async def keep(self, answer: Answer) -> None:
        """Returns when it is on disk."""
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((answer, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    await asyncio.to_thread(self._commit, [answer for answer, _ in batch])
                except Exception as error:
                    for _, written in batch:
                        if not written.done():
                            written.set_exception(error)
                else:
                    for _, written in batch:
                        if not written.done():
                            written.set_result(None)
        finally:
            self._writing = None

    def _commit(self, answers: list[Answer]) -> None:
        with self._sessions.begin() as session:
            keep_answers(session, answers)


@dataclass(frozen=True)
class _Ready:
    """A question whose turn it is, or what became of it already."""

    question: Question
    key: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    body: bytes = b""
    outcome: Outcome | None = None


class _GaveUp(Exception):
    """Too many questions in a row were given up."""


class _Run:
    """One go at a list of questions: one task makes them ready, as many as may be under way ask them."""

    def __init__(self, asker: Asker, questions: Sequence[Question]) -> None:
        self.asker, self.questions = asker, questions
        self.outcomes: dict[str, Outcome] = {}
        self.progress = Progress(len(questions), limit=asker.pace.knee)
        self._began = time.monotonic()
        self._queue: asyncio.Queue[_Ready | None] = asyncio.Queue(AHEAD)
        self._same: dict[str, list[str]] = {}  # key → ids of the equal questions under way
        self._given_up = 0  # in a row

    async def outcome(self) -> str:
        """Does it; returns why it ended before all was asked, if it did."""
        work, stopped = asyncio.create_task(self._work()), ""
        try:
            while not work.done() and not stopped:
                await asyncio.wait({work}, timeout=WATCH)
                stopped = "stopped" if not work.done() and self.asker._stop() else ""
            if not stopped:
                await work
        except ExceptionGroup as group:
            if not isinstance(first := group.exceptions[0], _GaveUp):
                raise first from None
            stopped = str(first)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            self._changed()
        return stopped

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._make_ready())
            for _ in range(min(self.asker.limits.concurrency, len(self.questions))):
                group.create_task(self._ask_on())

    async def _make_ready(self) -> None:
        for start in range(0, len(self.questions), AHEAD):
            chunk = self.questions[start : start + AHEAD]
            for ready in await asyncio.to_thread(self._ready, chunk):
                if ready.outcome is not None:
                    self._settle([ready.question.id], ready.outcome)
                elif ready.key in self._same:
                    self._same[ready.key].append(ready.question.id)
                else:
                    self._same[ready.key] = [ready.question.id]
                    await self._queue.put(ready)
        await self._queue.put(None)

    def _ready(self, questions: Sequence[Question]) -> list[_Ready]:
        made: list[_Ready] = []
        for question in questions:
            try:
                messages = question.messages()
            except UNREADABLE as error:
                made.append(_Ready(question, outcome=Outcome("bad image", trouble="bad image", message=str(error))))
                continue
            request = self.asker.request(messages, question.run)
            body = encode(self.asker.endpoint.model, messages, self.asker.decoding)
            made.append(_Ready(question, key_of(request), request, body))
        kept = self.asker._shelf.find([ready.key for ready in made])
        return [
            _Ready(ready.question, outcome=Outcome("answered", kept[ready.key], key=ready.key))
            if ready.key in kept
            else ready
            for ready in made
        ]

    async def _ask_on(self) -> None:
        while (ready := await self._queue.get()) is not None:
            outcome = await self._ask(ready)
            self._settle(self._same.pop(ready.key), outcome, new=True)
            self._given_up = 0 if outcome.state == "answered" else self._given_up + 1
            if self._given_up >= self.asker.limits.patience:
                raise _GaveUp(f"{self._given_up} questions in a row were given up, the last one so: {outcome.message}")
        await self._queue.put(None)  # for the next of us

    async def _ask(self, ready: _Ready) -> Outcome:
        try:
            reply, seconds = await self.asker.send(ready.body, self.progress.troubles)
        except Trouble as trouble:
            return Outcome("failed", trouble=trouble.kind, message=str(trouble), key=ready.key)
        answer = Answer(
            key=ready.key,
            request=ready.request,
            text=reply.text,
            finish_reason=reply.finish_reason,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            seconds=seconds,
            fingerprint=reply.fingerprint,
        )
        await self.asker._shelf.keep(answer)
        self._count(reply)
        return Outcome("answered", answer, key=ready.key)

    def _count(self, reply: Reply) -> None:
        progress, price = self.progress, self.asker.price
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            progress.uncounted += 1
            return
        progress.prompt_tokens += reply.prompt_tokens
        progress.completion_tokens += reply.completion_tokens
        if price is not None:
            spent = progress.prompt_tokens * price.prompt + progress.completion_tokens * price.completion
            progress.cost = spent / 1e6

    def _settle(self, ids: list[str], outcome: Outcome, *, new: bool = False) -> None:
        for id in ids:
            self.outcomes[id] = outcome
        if outcome.state != "answered":
            self.progress.failed += len(ids)
        elif new:
            self.progress.asked += 1
            self.progress.kept += len(ids) - 1
        else:
            self.progress.kept += len(ids)
        self._changed()

    def _changed(self) -> None:
        self.progress.limit = self.asker.pace.knee
        self.progress.seconds = time.monotonic() - self._began
        self.asker._tell(self.progress)


def _with_image_ids(messages: Messages) -> Messages:
    """The messages with the image id, the digest of its bytes, in the place of each data URL."""
    return [
        message | {"content": [_part_with_id(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _part_with_id(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image_url":
        return part
    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    return {"type": "image", "id": f"sha256:{hashlib.sha256(data).hexdigest()}"}
