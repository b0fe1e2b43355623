"""What a bare name means once there is another version of it."""

import asyncio
from pathlib import Path

import pytest

from basalt import registry
from basalt.object_store import DirectoryStore
from basalt.record.aliases import aliases_of
from basalt.record.database import open_database
from services.trainer.start import settle_name
from tests.tiny import make_assistant


@pytest.mark.parametrize("by_hand", [True, False], ids=["published by hand", "published by a job"])
def test_the_first_version_of_a_name_stays_what_it_means(tmp_path: Path, by_hand: bool) -> None:
    store, sessions = DirectoryStore(tmp_path / "objects"), open_database(f"sqlite:///{tmp_path}/basalt.db")

    def publish(seed: int) -> str:
        assistant = make_assistant(tmp_path / str(seed), "cat", Path("tower"), seed=seed)
        return asyncio.run(registry.publish(store, assistant))

    def settle() -> str | None:
        with sessions.begin() as session:
            return settle_name("cat", session, store, tmp_path / "no-models")

    if not by_hand:
        assert settle() is None
    first = publish(1)
    assert settle() == first
    publish(2)
    assert settle() == first
    with sessions() as session:
        assert aliases_of(session, "cat") == {"production": first.replace("cat@", "sha256:")}
