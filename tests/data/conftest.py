"""Material for scenes that the tests draw themselves: two small emoji packages and Pillow's own font."""

import json
from pathlib import Path

import pytest
from PIL import ImageFont

NOUNS = {
    "1f436": ("dog-face", "dog"),
    "1f431": ("cat-face", "cat"),
    "1f34e": ("red-apple", "apple"),
    "1f697": ("automobile", "car"),
    "1f682": ("locomotive", "train"),
    "1f347": ("grapes", "grapes"),
    "1f35e": ("bread", "bread"),
    "1f984": ("unicorn", "unicorn"),
}


DISC, CAT = "#c03020", "#1030a0"


def write_package(directory: Path, *, colour: str, named: bool = True) -> Path:
    """An emoji package in iconify's form: a small disc for each noun, a blue oblong for the cat."""
    directory.mkdir(parents=True)
    disc = f'<circle cx="20" cy="20" r="10" fill="{colour}"/>'
    icons = {name: {"body": disc} for name, _ in NOUNS.values() if name != "cat-face"}
    icons["cat"] = {"body": f'<rect x="4" y="4" width="40" height="20" fill="{CAT}"/>'}
    package = {"width": 64, "height": 64, "icons": icons, "aliases": {"cat-face": {"parent": "cat"}}}
    (directory / "icons.json").write_text(json.dumps(package))
    names = {code: name for code, (name, _) in NOUNS.items()} if named else {}
    (directory / "chars.json").write_text(json.dumps(names))
    return directory


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("emoji") / "plain", colour=DISC)


@pytest.fixture(scope="session")
def font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built_in = ImageFont.load_default(20)
    assert isinstance(built_in, ImageFont.FreeTypeFont)
    path = tmp_path_factory.mktemp("fonts") / "built-in.ttf"
    path.write_bytes(built_in.path.getvalue())  # type: ignore[union-attr]
    return path
