"""Pointers to versions: promotion, rollback, and two hands at once."""

import pytest

from basalt.record.aliases import AliasError, alias_history, aliases_of, get_alias, roll_back, set_alias
from basalt.record.database import Sessions, open_database

A, B, C = ("sha256:" + digit * 64 for digit in "abc")


@pytest.fixture
def sessions(url: str) -> Sessions:
    return open_database(url)


def promote(sessions: Sessions, *versions: str, alias: str = "production") -> None:
    for version in versions:
        with sessions.begin() as session:
            set_alias(session, "cat", alias, version, expected=get_alias(session, "cat", alias))


def back(sessions: Sessions) -> str:
    with sessions.begin() as session:
        return roll_back(session, "cat", "production")


def test_an_alias_points_where_it_was_set_last(sessions: Sessions) -> None:
    promote(sessions, A, B)
    promote(sessions, C, alias="candidate")
    with sessions() as session:
        assert get_alias(session, "cat", "production") == B
        assert aliases_of(session, "cat") == {"production": B, "candidate": C}
        assert get_alias(session, "dog", "production") is None
        assert aliases_of(session, "dog") == {}


def test_rolling_back_goes_back_promotion_by_promotion_and_keeps_what_happened(sessions: Sessions) -> None:
    promote(sessions, A, B, C)
    assert back(sessions) == B
    assert back(sessions) == A
    with pytest.raises(AliasError, match="nothing to go back to"):
        back(sessions)
    promote(sessions, C)
    assert back(sessions) == A
    with sessions() as session:
        history = alias_history(session, "cat", "production")
    assert [(change.version, change.rollback) for change in history] == [
        (A, False), (B, False), (C, False), (B, True), (A, True), (C, False), (A, True),
    ]  # fmt: skip
    assert all(change.created_at > 1_700_000_000 for change in history)


def test_pointing_to_the_same_again_is_no_change(sessions: Sessions) -> None:
    promote(sessions, A, B, B)
    assert back(sessions) == A


def test_what_points_elsewhere_by_now_is_not_set(sessions: Sessions) -> None:
    promote(sessions, A)
    for expected, found in ((None, A), (B, A)):
        with sessions.begin() as session, pytest.raises(AliasError, match=f"points to {found} by now"):
            set_alias(session, "cat", "production", C, expected=expected)
    with sessions.begin() as session, pytest.raises(AliasError, match="points nowhere"):
        set_alias(session, "cat", "candidate", C, expected=A)


def test_of_two_at_once_one_wins_and_the_other_is_told(url: str, sessions: Sessions) -> None:
    if url.startswith("sqlite"):
        pytest.skip("SQLite's transactions wait for each other")
    promote(sessions, A)
    with sessions.begin() as one:
        one.connection(execution_options={"isolation_level": "REPEATABLE READ"})  # it goes on seeing A
        assert get_alias(one, "cat", "production") == A
        promote(sessions, B)
        with pytest.raises(AliasError, match="changed at the same time"):
            set_alias(one, "cat", "production", C, expected=A)
    with sessions() as session:
        assert get_alias(session, "cat", "production") == B


def test_an_alias_that_is_none(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for alias in ("", "Production", "a b", "sha256:ab", "deadbeef", "a" * 64, "-x"):
            with pytest.raises(AliasError, match="cannot be an alias"):
                set_alias(session, "cat", alias, A, expected=None)
    with sessions.begin() as session, pytest.raises(AliasError, match="no alias 'production'; it has: none"):
        roll_back(session, "cat", "production")
