"""Kept responses: conversations, owners, time."""

import pytest

from basalt.record.database import Sessions, open_database
from basalt.record.responses import (
    KeptResponse,
    NoSuchResponse,
    conversation,
    delete_response,
    get_response,
    keep_longer,
    keep_response,
)

SOON = 1e-9  # days


@pytest.fixture
def sessions(url: str) -> Sessions:
    return open_database(url)


def keep(sessions: Sessions, name: str, previous: str | None = None, owner: str = "me", days: float = 1) -> None:
    row = KeptResponse(id=name, owner=owner, previous_id=previous, body={"id": name}, input=[{"type": "message"}])
    with sessions.begin() as session:
        keep_response(session, row, days)


def turns(sessions: Sessions, name: str, owner: str = "me") -> list[str]:
    with sessions() as session:
        return [turn.id for turn in conversation(session, name, owner)]


def test_a_conversation_is_all_its_turns_in_order(sessions: Sessions) -> None:
    keep(sessions, "a")
    keep(sessions, "b", "a")
    keep(sessions, "c", "b")
    keep(sessions, "other", "a")
    assert turns(sessions, "c") == ["a", "b", "c"]
    assert turns(sessions, "other") == ["a", "other"]
    with sessions() as session:
        assert get_response(session, "b", "me").body == {"id": "b"}


def test_a_conversation_that_lost_a_turn_is_over(sessions: Sessions) -> None:
    keep(sessions, "a")
    keep(sessions, "b", "a")
    keep(sessions, "c", "b")
    with sessions.begin() as session:
        delete_response(session, "a", "me")
    with pytest.raises(NoSuchResponse, match="'a'"):
        turns(sessions, "c")


def test_others_see_nothing(sessions: Sessions) -> None:
    keep(sessions, "a")
    keep(sessions, "b", "a", owner="other")  # which no service would keep
    with pytest.raises(NoSuchResponse):
        turns(sessions, "a", owner="other")
    with pytest.raises(NoSuchResponse, match="'a'"):
        turns(sessions, "b", owner="other")
    with sessions.begin() as session, pytest.raises(NoSuchResponse):
        delete_response(session, "a", "other")
    assert turns(sessions, "a") == ["a"]


def test_what_expired_is_gone_unless_it_was_gone_on_from(sessions: Sessions) -> None:
    keep(sessions, "a")
    keep(sessions, "old", days=SOON)
    with sessions() as session:
        assert session.get(KeptResponse, "old")
        with pytest.raises(NoSuchResponse):
            get_response(session, "old", "me")
    with sessions.begin() as session:
        first = conversation(session, "a", "me")
        keep_longer(session, first, 2)
    keep(sessions, "b", "a", days=2)
    with sessions() as session:
        assert session.get(KeptResponse, "old") is None
        ends = [get_response(session, name, "me").expires_at for name in ("a", "b")]
    assert abs(ends[0] - ends[1]) < 60


def test_a_long_conversation(sessions: Sessions) -> None:
    names = [f"turn-{index}" for index in range(300)]
    for previous, name in zip([None, *names], names, strict=False):
        keep(sessions, name, previous)
    assert turns(sessions, names[-1]) == names
