"""Nouns, their forms, and pictures rendered from SVG packages."""

from pathlib import Path

import pytest

from basalt.data.emoji import CATEGORY, CLASSES, MASS, PLURAL_ONLY, indefinite, load_emoji, plural
from tests.data.conftest import NOUNS, write_package


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("dog", "dogs"),
        ("mouse", "mice"),
        ("sheep", "sheep"),
        ("leaf", "leaves"),
        ("fox", "foxes"),
        ("sandwich", "sandwiches"),
        ("strawberry", "strawberries"),
        ("key", "keys"),
        ("woman", "women"),
        ("hot dog", "hot dogs"),
        ("scissors", "scissors"),
        ("bread", "bread"),
    ],
)
def test_plurals(noun: str, many: str) -> None:
    assert plural(noun) == many


def test_articles() -> None:
    forms = [indefinite(noun) for noun in ("dog", "apple", "umbrella", "unicorn", "grapes", "milk")]
    assert forms == ["a dog", "an apple", "an umbrella", "a unicorn", "grapes", "milk"]


def test_a_noun_and_an_emoji_stand_in_the_table_once() -> None:
    nouns = [noun for table in CLASSES.values() for noun in table]
    characters = "".join(emoji for table in CLASSES.values() for emoji in table.values())
    assert len(nouns) == len(set(nouns)) == len(CATEGORY)
    assert len(characters) == len(set(characters))
    assert CATEGORY.keys() >= PLURAL_ONLY | MASS


def test_pictures_are_trimmed_and_as_large_as_asked(package: Path) -> None:
    pictures = load_emoji([package], size=48)
    assert set(pictures) == {noun for _, noun in NOUNS.values()}, "a noun no package shows is left out"
    dog, cat = pictures["dog"][0], pictures["cat"][0]  # the cat is drawn under an alias
    assert dog.mode == "RGBA"
    assert dog.size == (48, 48)
    assert cat.size == (48, 24), "the drawing's own shape is kept"
    assert cat.getpixel((24, 12)) == (0x10, 0x30, 0xA0, 255)


def test_a_package_without_names_is_read_by_the_names_of_its_neighbour(package: Path, tmp_path: Path) -> None:
    nameless = write_package(tmp_path / "nameless", colour="#2030c0", named=False)
    assert load_emoji([nameless], size=16) == {}
    for order in ([package, nameless], [nameless, package]):
        assert {len(images) for images in load_emoji(order, size=16).values()} == {2}


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"chars\.json"):
        load_emoji([tmp_path])
