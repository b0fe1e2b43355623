"""API keys, from the command line to a request."""

import sqlite3
import time
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from basalt import api_errors
from basalt.auth import Caller, Guard, is_loopback
from basalt.cli import app
from basalt.record.database import open_database
from basalt.record.reader import Reader


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path}/basalt.db"
    monkeypatch.setenv("BASALT_DATABASE", url)
    return url


def service(database: str, scope: str, **options: Any) -> TestClient:
    guarded = FastAPI()
    api_errors.install(guarded, "test")
    guard = Guard(Reader(open_database(database)), scope, **{"host": "0.0.0.0"} | options)

    @guarded.get("/")
    async def root(caller: Annotated[Caller, Depends(guard)]) -> dict[str, str]:
        return {"key": caller.id}

    return TestClient(guarded)


def make(*arguments: str) -> tuple[str, str]:
    made = CliRunner().invoke(app, ["keys", "create", *arguments])
    assert made.exit_code == 0, made.output
    key, secret = made.output.strip().split("\t")
    return key, secret


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_a_key_is_made_used_and_revoked(database: str) -> None:
    key, secret = make("ada")
    client = service(database, "train")
    assert client.get("/", headers=bearer(secret)).json() == {"key": key}
    assert secret.encode() not in Path(database.removeprefix("sqlite:///")).read_bytes()
    assert f"{key}\tada\tchat,train,evaluate\tvalid" in CliRunner().invoke(app, ["keys", "list"]).output
    assert CliRunner().invoke(app, ["keys", "revoke", key]).exit_code == 0
    refused = client.get("/", headers=bearer(secret))
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert f"{key}\tada\tchat,train,evaluate\trevoked" in CliRunner().invoke(app, ["keys", "list"]).output


def test_a_key_may_do_what_its_scopes_say(database: str) -> None:
    _, secret = make("ada", "--scope", "chat")
    assert service(database, "chat").get("/", headers=bearer(secret)).status_code == 200
    refused = service(database, "train").get("/", headers=bearer(secret))
    assert refused.status_code == 403
    assert "may not train: its scopes are chat" in refused.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic YTpi"}, bearer(""), bearer("bsk-unknown")])
def test_without_a_key_only_loopback_answers(database: str, headers: dict[str, str]) -> None:
    assert service(database, "chat").get("/", headers=headers).status_code == 401
    assert service(database, "chat", host="127.0.0.1", required=True).get("/", headers=headers).status_code == 401
    assert service(database, "chat", host="127.0.0.1").get("/", headers=headers).json() == {"key": ""}


def test_loopback_may_be_opened_and_others_too(database: str) -> None:
    assert service(database, "chat", required=False).get("/").json() == {"key": ""}


def test_basalts_own_services_have_a_key_of_their_own(database: str) -> None:
    client = service(database, "chat", own_key="between-us")
    assert client.get("/", headers=bearer("between-us")).json() == {"key": "basalt"}
    assert client.get("/", headers=bearer("between-u")).status_code == 401
    assert service(database, "chat", own_key="").get("/", headers=bearer("")).status_code == 401


def test_a_known_key_goes_on_being_valid_without_the_state_of_record(database: str) -> None:
    key, secret = make("ada")
    client = service(database, "chat", fresh_seconds=0.01)
    assert client.get("/", headers=bearer(secret)).json() == {"key": key}
    with sqlite3.connect(database.removeprefix("sqlite:///")) as away:
        away.execute("ALTER TABLE api_keys RENAME TO away")
    assert client.get("/", headers=bearer(secret)).json() == {"key": key}
    unknown = client.get("/", headers=bearer("bsk-another"))
    assert unknown.status_code == 503 and "state of record" in unknown.json()["error"]["message"]


def test_a_state_of_record_that_is_frozen_does_not_hold_up_known_keys(database: str) -> None:
    key, secret = make("ada")
    with service(database, "chat", fresh_seconds=0.01) as client:
        assert client.get("/", headers=bearer(secret)).json() == {"key": key}
        frozen = sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None)
        frozen.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        for _ in range(20):
            assert client.get("/", headers=bearer(secret)).json() == {"key": key}
            time.sleep(0.01)
        assert time.monotonic() - began < 2
        unknown = client.get("/", headers=bearer("bsk-another"))
        assert unknown.status_code == 503 and "Retry-After" in unknown.headers
        assert time.monotonic() - began < 10
        frozen.execute("ROLLBACK")
        assert client.get("/", headers=bearer("bsk-another")).status_code == 401


def test_a_revoked_key_is_refused_when_it_is_looked_up_again(database: str) -> None:
    key, secret = make("ada")
    client = service(database, "chat", fresh_seconds=0.2)
    assert client.get("/", headers=bearer(secret)).status_code == 200
    assert CliRunner().invoke(app, ["keys", "revoke", key]).exit_code == 0
    time.sleep(0.2)
    assert client.get("/", headers=bearer(secret)).status_code == 401


def test_limits_of_a_key(database: str) -> None:
    made = CliRunner().invoke(app, ["keys", "create", "ada", "--limit", "requests_per_minute=60"])
    assert made.exit_code == 0
    assert "valid\trequests_per_minute=60" in CliRunner().invoke(app, ["keys", "list"]).output
    for wrong, told in (("requests_per_hour=1", "unknown limit"), ("requests_per_minute", "NAME=NUMBER")):
        refused = CliRunner().invoke(app, ["keys", "create", "ada", "--limit", wrong])
        assert refused.exit_code != 0 and told in refused.output


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "basalt.example")))


def test_what_is_wrong_on_the_command_line_is_told(database: str) -> None:
    assert "unknown scope 'fly'" in CliRunner().invoke(app, ["keys", "create", "ada", "--scope", "fly"]).output
    gone = CliRunner().invoke(app, ["keys", "revoke", "key-1"])
    assert gone.exit_code == 1
    assert "there is no key 'key-1'" in gone.output
