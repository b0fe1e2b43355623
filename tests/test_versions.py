"""`basalt models` as it is typed, over a registry in a directory and a state of record in a file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from basalt.cli import app
from tests.tiny import make_assistant

Basalt = Callable[..., Result]


@pytest.fixture
def basalt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Basalt:
    """Runs `basalt models …` with a registry of its own."""
    monkeypatch.setenv("BASALT_STORE", str(tmp_path / "objects"))
    monkeypatch.setenv("BASALT_DATABASE", f"sqlite:///{tmp_path}/basalt.db")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["models", *map(str, arguments)])


def publish(basalt: Basalt, tmp_path: Path, seed: int) -> str:
    """NAME@HEX of a `cat` with a projector of its own."""
    done = basalt("publish", make_assistant(tmp_path / str(seed), "cat", Path("tower"), seed=seed))
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def test_a_version_is_promoted_and_rolled_back(basalt: Basalt, tmp_path: Path) -> None:
    first, second = (publish(basalt, tmp_path, seed) for seed in (1, 2))
    assert basalt("promote", first).exit_code == 0
    assert basalt("promote", second, "--alias", "candidate").exit_code == 0
    promoted = basalt("promote", "cat@candidate")
    assert promoted.stdout.strip() == f"cat@production: {'sha256:' + first[4:]} → {'sha256:' + second[4:]}"
    shown = json.loads(basalt("show", "cat").stdout)
    assert shown["version"] == second
    assert shown["aliases"] == ["candidate", "production"]
    back = basalt("rollback", "cat")
    assert back.exit_code == 0, back.output
    listed = dict(line.split("\t", 1) for line in basalt("list").stdout.splitlines())
    assert listed == {first: "production\tregistry", second: "candidate\tregistry"}
    told = [line.split("\t")[1:] for line in basalt("history", "cat").stdout.splitlines()]
    assert told == [["promote", first], ["promote", second], ["rollback", first]]
    again = basalt("rollback", "cat")
    assert again.exit_code == 1
    assert "nothing to go back to" in again.stderr


def test_what_was_pulled_is_told_beside_the_registry(basalt: Basalt, tmp_path: Path) -> None:
    reference = publish(basalt, tmp_path, 1)
    assert basalt("pull", reference[: len("cat@") + 8]).stdout.strip() == str(Path("models/cat"))
    assert basalt("list").stdout.split("\n")[0] == f"{reference}\t-\tregistry, models"
    by_directory, by_name = (json.loads(basalt("show", which).stdout) for which in ("models/cat", "cat"))
    assert by_directory == by_name
    assert by_name["manifest"]["parts"].keys() == {"projector.safetensors", "chat_template.jinja"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["promote", "cat"], "say which version: cat@VERSION"),
        (["promote", "cat@none"], "cat has no version or alias 'none'"),
        (["promote", "cat@{0}", "--alias", "Best"], "'Best' cannot be an alias"),
        (["rollback", "cat"], "cat has no alias 'production'; it has: none"),
        (["rollback", "dog"], "dog has no alias"),
        (["pull", "dog"], "the registry has no assistant 'dog'; it has: cat"),
        (["show", "models/cat"], "the registry has no assistant 'models/cat'"),
        (["publish", "nowhere"], "give the assistant a --name"),
        (["publish", "nowhere", "--name", "cat"], "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(basalt: Basalt, tmp_path: Path, arguments: list[str], told: str) -> None:
    version = publish(basalt, tmp_path, 1)[4:]
    done = basalt(*(argument.format(version) for argument in arguments))
    assert done.exit_code == 1
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_promoting_what_is_not_whole_is_refused(basalt: Basalt, tmp_path: Path) -> None:
    reference = publish(basalt, tmp_path, 1)
    for part in (tmp_path / "objects" / "parts" / "sha256").iterdir():
        part.unlink()
    done = basalt("promote", reference)
    assert done.exit_code == 1
    assert "the registry has no part" in done.stderr
