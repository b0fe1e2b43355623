"""What `model` means: aliases, versions, canaries; changes hold at once and nothing is restarted."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from basalt.assistants import load_assistant
from basalt.object_store import DirectoryStore
from basalt.record.aliases import get_alias, roll_back, set_alias
from basalt.record.canaries import end_canary, set_canary
from basalt.record.database import Sessions, open_database
from basalt.registry import publish
from services.gateway.assistants import FRESH_SECONDS
from tests.gateway.conftest import Stack
from tests.tiny import make_assistant


@pytest.fixture(scope="module")
def stack(start: Callable[..., Stack]) -> Stack:
    return start()


@pytest.fixture
def sessions(stack: Stack) -> Sessions:
    return open_database(f"sqlite:///{stack.vision.store.parent / 'basalt.db'}")


@pytest.fixture
def versions(stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    """An assistant with two versions in the registry, in nobody's directory: its name, and both."""
    name = f"v{abs(hash(request.node.name)) % 10**8}"
    found = []
    for seed in (1, 2):
        root = tmp_path / str(seed)
        make_assistant(root, name, stack.vision.models.parent / "tower", seed=seed)
        asyncio.run(publish(DirectoryStore(stack.vision.store), root / name))
        found.append(load_assistant(root / name).version)
    return name, found


def point(sessions: Sessions, name: str, version: str, alias: str = "production") -> None:
    with sessions.begin() as session:
        set_alias(session, name, alias, version, expected=get_alias(session, name, alias))
    time.sleep(FRESH_SECONDS)


def served(stack: Stack, model: str, text: str = "hi", **fields: object) -> str:
    """The version, sha256:…, that answers."""
    response = stack.post({"model": model, "messages": [{"role": "user", "content": text}]} | fields)
    assert response.status_code == 200, response.text
    assert stack.llm.bodies[-1]["model"] == response.headers["X-Basalt-Version"]
    return "sha256:" + response.headers["X-Basalt-Version"].partition("@")[2]


def test_an_alias_is_followed_and_rolled_back(stack: Stack, sessions: Sessions, versions: tuple[str, list[str]]):
    name, (old, new) = versions
    point(sessions, name, old)
    assert served(stack, name) == old
    point(sessions, name, new)
    assert served(stack, name) == served(stack, f"{name}@production") == new
    with sessions.begin() as session:
        roll_back(session, name, "production")
    time.sleep(FRESH_SECONDS)
    assert served(stack, name) == old


def test_versions_by_their_digits(stack: Stack, versions: tuple[str, list[str]]):
    name, (old, new) = versions
    for version in (old, new):
        digits = version.removeprefix("sha256:")
        assert served(stack, f"{name}@{digits}") == served(stack, f"{name}@{digits[:10]}") == version


def test_several_versions_and_no_alias_ask_for_one(stack: Stack, versions: tuple[str, list[str]]):
    response = stack.post({"model": versions[0], "messages": [{"role": "user", "content": "hi"}]})
    assert response.status_code == 404
    assert "production" in response.json()["error"]["message"]


def test_a_canary_gets_its_share_and_conversations_stay(
    stack: Stack, sessions: Sessions, versions: tuple[str, list[str]]
):
    name, (old, new) = versions
    point(sessions, name, old)
    with sessions.begin() as session:
        set_canary(session, name, new, 0.3)
    time.sleep(FRESH_SECONDS)
    answered = {n: served(stack, name, f"conversation {n}") for n in range(120)}
    assert 0.15 < sum(version == new for version in answered.values()) / 120 < 0.45
    assert {n: served(stack, name, f"conversation {n}") for n in range(120)} == answered
    assert {served(stack, name, f"any {n}", user="the same person") for n in range(10)} in ({old}, {new})
    assert served(stack, f"{name}@production", "conversation 1") == old
    with sessions.begin() as session:
        end_canary(session, name)
    time.sleep(FRESH_SECONDS)
    assert {served(stack, name, f"conversation {n}") for n in range(30)} == {old}


def test_images_and_answers_are_of_the_same_version(
    stack: Stack, sessions: Sessions, versions: tuple[str, list[str]], image_url: str
):
    name, (old, new) = versions
    digests = set()
    for version in (old, new, old):
        point(sessions, name, version)
        content = [{"type": "image_url", "image_url": {"url": image_url}}]
        response = stack.post({"model": name, "messages": [{"role": "user", "content": content}]})
        assert response.headers["X-Basalt-Version"] == f"{name}@{version.removeprefix('sha256:')}"
        digests.add(stack.llm.bodies[-1]["messages"][0]["content"][0]["uuid"])
    assert len(digests) == 2


@pytest.mark.parametrize(
    "model", ["nobody", "nobody@production", "one@nothing", "one@", "@", "../one", "One", "o" * 99]
)
def test_unknown_models_are_told_which_there_are(stack: Stack, model: str):
    response = stack.post({"model": model, "messages": [{"role": "user", "content": "hi"}]})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "one" in response.json()["error"]["message"]


@pytest.fixture
def image_url() -> str:
    import base64

    from tests.tiny import picture

    return "data:image/png;base64," + base64.b64encode(picture(77)).decode()


def test_the_list_of_models_says_which_version_a_name_means(
    stack: Stack, sessions: Sessions, versions: tuple[str, list[str]]
):
    name, (_, new) = versions
    assert told_versions(stack)[name] is None  # two versions, and none in production
    point(sessions, name, new)
    told = told_versions(stack)
    assert told[name] == httpx.get(f"{stack.url}/v1/models/{name}").json()["version"] == new
    assert told["one"]  # of the vision service's own directory


def told_versions(stack: Stack) -> dict[str, str | None]:
    return {each["id"]: each.get("version") for each in httpx.get(f"{stack.url}/v1/models").json()["data"]}
