"""Files: whose they are."""

import pytest

from basalt.record.database import Sessions, open_database
from basalt.record.files import File, NoSuchFile, get_file, list_files


@pytest.fixture
def sessions(url: str) -> Sessions:
    return open_database(url)


def listed(sessions: Sessions, owner: str, after: str | None = None) -> list[str]:
    with sessions() as session:
        return [file.id for file in list_files(session, owner, purpose=None, after=after, limit=10)]


def test_each_owner_sees_its_own(sessions: Sessions) -> None:
    for owner, name in (("", "file-open"), ("key-a", "file-a"), ("key-a", "file-b")):
        with sessions.begin() as session:
            session.add(
                File(id=name, owner=owner, filename="x", purpose="vision", bytes=1, digest="sha256:" + "0" * 64)
            )
    assert listed(sessions, "key-a") == ["file-b", "file-a"]
    assert listed(sessions, "key-a", after="file-b") == ["file-a"]
    assert listed(sessions, "") == ["file-open"]
    assert listed(sessions, "key-b") == []
    with sessions() as session:
        assert get_file(session, "file-a", "key-a").id == "file-a"
        for owner in ("", "key-b"):
            with pytest.raises(NoSuchFile):
                get_file(session, "file-a", owner)
        with pytest.raises(NoSuchFile):
            list_files(session, "key-b", purpose=None, after="file-a", limit=10)
