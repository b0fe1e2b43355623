"""Asking as it goes on the wire: real HTTP to a server that is good, slow, full, broken or gone."""

import asyncio
import base64
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import Response
from sqlalchemy.orm import Session, sessionmaker

from basalt.eval.asking import Asked, Asker, Limits, Price, Question
from basalt.eval.endpoint import AskError, Endpoint
from basalt.record.database import open_database
from tests.eval.openai_shaped import Server, completion, serving, text_of

Sessions = sessionmaker[Session]


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return open_database(f"sqlite:///{tmp_path}/basalt.db")


def question(text: str, id: str = "", run: int = 0) -> Question:
    return Question(id or text, lambda: [{"role": "user", "content": text}], run)


def questions(count: int) -> list[Question]:
    return [question(f"q{number}") for number in range(count)]


def ask(server: Server, sessions: Sessions, asked: Sequence[Question], **options: Any) -> Asked:
    endpoint = Endpoint(server.url, "m", seconds=options.pop("seconds", 5))
    decoding = options.pop("decoding", {"temperature": 0})

    async def work() -> Asked:
        async with Asker(endpoint, decoding, sessions, **options).open() as asker:
            return await asker.ask(asked)

    return asyncio.run(work())


async def echo(body: dict[str, Any], _: int) -> Response:
    return completion(f"said {text_of(body)}")


def test_every_question_is_answered_in_order_and_kept(sessions: Sessions) -> None:
    with serving(echo) as server:
        first = ask(server, sessions, questions(50), price=Price(1.0, 10.0))
        again = ask(server, sessions, questions(50))
    assert [(id, one.answer.text) for id, one in first.outcomes.items() if one.answer] == [
        (f"q{number}", f"said q{number}") for number in range(50)
    ]
    assert {one.answer.text for one in again.outcomes.values() if one.answer} == {f"said q{n}" for n in range(50)}
    assert set(server.asked.values()) == {1}
    assert (first.progress.asked, first.progress.kept) == (50, 0)
    assert (again.progress.asked, again.progress.kept) == (0, 50)
    assert first.progress.prompt_tokens == 500
    assert first.progress.cost == pytest.approx((500 * 1 + 100 * 10) / 1e6)
    assert (first.served.version, first.served.fingerprint) == ("1", "fp-1")


def test_an_answer_is_known_by_all_it_depends_on(sessions: Sessions) -> None:
    def shown(data: bytes) -> Question:
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        return Question("1", lambda: [{"role": "user", "content": parts}])

    with serving(echo) as server:
        ask(server, sessions, [shown(b"one picture")])
        for changed in ({}, {"decoding": {"temperature": 1}}):
            ask(server, sessions, [shown(b"one picture")], **changed)
        ask(server, sessions, [shown(b"another picture")])
        ask(server, sessions, [question("what?", "1")])
        ask(server, sessions, [question("what?", "1", run=1)])
        assert server.asked["what?"] == 5  # all but the second
    with serving(echo, version="2") as server:
        ask(server, sessions, [shown(b"one picture")])
        assert server.asked["what?"] == 1


def test_equal_questions_are_asked_once(sessions: Sessions) -> None:
    async def slow(body: dict[str, Any], _: int) -> Response:
        await asyncio.sleep(0.05)
        return completion("yes")

    with serving(slow) as server:
        asked = ask(server, sessions, [question(f"q{number % 7}", str(number)) for number in range(60)])
        assert set(server.asked.values()) == {1} and len(server.asked) == 7
    assert all(one.state == "answered" for one in asked.outcomes.values())
    assert asked.progress.done == 60


def test_what_goes_wrong_is_tried_again_and_counted(sessions: Sessions) -> None:
    async def bad_at_first(body: dict[str, Any], time_asked: int) -> Response:
        number = int(text_of(body)[1:])
        if time_asked > 1 or number >= 6:
            return completion("well")
        return [
            Response("busy", 429, {"Retry-After": "0"}),
            Response('{"error": {"message": "broken"}}', 500),
            Response("<html>not JSON</html>"),
            Response('{"choices": []}'),
            completion(7),
            completion(None, choices="[" * 10),
        ][number]

    with serving(bad_at_first) as server:
        asked = ask(server, sessions, questions(10))
    assert all(one.state == "answered" for one in asked.outcomes.values())
    assert asked.progress.troubles == {"429": 1, "500": 1, "garbage": 4}


def test_a_failure_is_a_state_of_its_own_and_is_asked_again_next_time(sessions: Sessions) -> None:
    ill = True

    async def behave(body: dict[str, Any], _: int) -> Response:
        if ill and text_of(body) == "q3":
            return Response('{"error": {"message": "the context is too long"}}', 400)
        if ill and text_of(body) == "q5":
            await asyncio.sleep(1)
        return completion("well")

    with serving(behave) as server:
        asked = ask(server, sessions, questions(8), seconds=0.2, limits=Limits(attempts=2))
        assert (asked.outcomes["q3"].state, asked.outcomes["q3"].trouble) == ("failed", "400")
        assert "the context is too long" in asked.outcomes["q3"].message
        assert (asked.outcomes["q5"].state, asked.outcomes["q5"].trouble) == ("failed", "timeout")
        assert server.asked["q3"] == 1 and server.asked["q5"] == 2  # a refusal is final, silence is not
        assert asked.progress.troubles == {"400": 1, "timeout": 2}
        assert (asked.progress.asked, asked.progress.failed) == (6, 2)
        ill = False
        again = ask(server, sessions, questions(8))
        assert again.progress.asked == 2 and all(one.state == "answered" for one in again.outcomes.values())


def test_a_wish_to_wait_holds_for_everybody(sessions: Sessions) -> None:
    async def full_once(body: dict[str, Any], time_asked: int) -> Response:
        if text_of(body) == "q0" and time_asked == 1:
            return Response("later", 429, {"Retry-After": "1"})
        await asyncio.sleep(0.02)
        return completion("well")

    with serving(full_once) as server:
        ask(server, sessions, questions(40))
        gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert max(gaps) > 0.9


def test_concurrency_grows_to_the_knee_and_not_beyond(sessions: Sessions) -> None:
    """A server of eight at a time, 100 ms each: more than eight or so bring nothing."""
    slots = asyncio.Semaphore(8)

    async def eight(body: dict[str, Any], _: int) -> Response:
        async with slots:
            await asyncio.sleep(0.1)
        return completion("well")

    with serving(eight) as server:
        asked = ask(server, sessions, questions(300))
        assert 7 <= asked.progress.limit <= 32 and server.most <= 64  # on a busy machine a rate is a rough one
        assert asked.progress.asked / asked.progress.seconds > 0.6 * 8 / 0.1


def test_a_server_that_refuses_more_than_five_gets_about_five(sessions: Sessions) -> None:
    busy = 0

    async def five(body: dict[str, Any], _: int) -> Response:
        nonlocal busy
        if busy >= 5:
            return Response("full", 429)
        busy += 1
        await asyncio.sleep(0.1)  # long beside what a busy machine needs to send the next
        busy -= 1
        return completion("well")

    with serving(five) as server:
        asked = ask(server, sessions, questions(200), limits=Limits(attempts=10))
    assert all(one.state == "answered" for one in asked.outcomes.values())
    assert 2 <= asked.progress.limit <= 7
    assert asked.progress.troubles["429"] < 60


def test_a_server_that_dies_ends_the_run_and_the_next_goes_on(sessions: Sessions) -> None:
    async def dies(*_: object) -> Response:
        return Response("gone", 502) if server.asked.total() > 60 else completion("well")

    with serving(dies) as server:
        asked = ask(server, sessions, questions(400), limits=Limits(attempts=1, patience=5))
        answered = [id for id, one in asked.outcomes.items() if one.state == "answered"]
        assert "in a row were given up" in asked.stopped and "502" in asked.stopped
        assert 30 < len(answered) <= 60
        assert sum(one.state == "not asked" for one in asked.outcomes.values()) > 200
        before, server.behave = dict(server.asked), echo
        assert ask(server, sessions, questions(400)).stopped == ""
        assert all(server.asked[id] == before[id] for id in answered)


def test_a_run_is_stopped_at_once_and_what_was_answered_stays(sessions: Sessions) -> None:
    async def slow(body: dict[str, Any], _: int) -> Response:
        await asyncio.sleep(0.1 if int(text_of(body)[1:]) < 20 else 30)
        return completion("well")

    began = time.monotonic()
    with serving(slow) as server:
        asked = ask(server, sessions, questions(100), seconds=60, stop=lambda: time.monotonic() > began + 1.5)
        assert time.monotonic() - began < 3
    assert asked.stopped == "stopped"
    states = [one.state for one in asked.outcomes.values()]
    assert 10 <= states.count("answered") <= 20 and states.count("answered") + states.count("not asked") == 100


def test_images_that_cannot_be_read_are_named(sessions: Sessions) -> None:
    def broken() -> list[dict[str, Any]]:
        raise OSError("cannot identify image file")

    with serving(echo) as server:
        asked = ask(server, sessions, [question("q0"), Question("bad", broken), question("q1")])
    assert [one.state for one in asked.outcomes.values()] == ["answered", "bad image", "answered"]
    assert "cannot identify" in asked.outcomes["bad"].message


def test_an_endpoint_that_cannot_be_asked_says_why(sessions: Sessions) -> None:
    async def work(endpoint: Endpoint) -> None:
        async with Asker(endpoint, {}, sessions).open():
            pass

    with serving(echo) as server, pytest.raises(AskError, match="has no model 'other'; it has m"):
        asyncio.run(work(Endpoint(server.url, "other")))
    for url, told in (("http://127.0.0.1:9/v1", "no server answers"), ("localhost:8080", "is no http")):
        with pytest.raises(AskError, match=told):
            asyncio.run(work(Endpoint(url, "m")))
    assert "secret" not in repr(Endpoint("http://x/v1", "m", "secret"))
