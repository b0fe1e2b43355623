"""Drawn scenes: what is asked fits what is drawn, the splits are apart, the same seed gives the same files."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from basalt.data.emoji import MASS, PLURAL_ONLY, indefinite, load_emoji
from basalt.data.preprocess import SPELLED
from basalt.data.readers import read_rows
from basalt.data.scenes import (
    COLOURS,
    NUMBERS,
    SHAPES,
    SIZE,
    Material,
    chart,
    group,
    held_out_words,
    make_scenes,
    pair,
    shape,
    shapes,
    thing,
    word,
)
from tests.data.conftest import CAT, DISC

SCENES = 220
KINDS = {"what", "count", "colour", "where", "yesno", "read", "spell", "chart", "caption"}


@pytest.fixture(scope="module")
def drawn(package: Path, font: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    for split in ("train", "test"):
        make_scenes(folder / split, emoji=[package], fonts=[font], count=SCENES, seed=3, split=split)
    return {split: folder / split for split in ("train", "test")}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "scenes.json").read_text())


@pytest.fixture
def material(package: Path, font: Path) -> Material:
    return Material(load_emoji([package]), [font], ["bank", "cafe", "garden"])


def test_every_row_is_llava_json_over_a_square_jpeg(drawn: dict[str, Path]) -> None:
    for split, folder in drawn.items():
        rows = rows_of(folder)
        assert len({row["id"] for row in rows}) == len(rows)
        assert len({row["image"] for row in rows}) == SCENES
        assert {row["kind"] for row in rows} == (KINDS if split == "train" else KINDS - {"spell"})
        for name in {row["image"] for row in rows[:60]}:
            with Image.open(folder / name) as image:
                assert (image.format, image.size) == ("JPEG", (SIZE, SIZE))
        for row, read in zip(rows, read_rows(folder / "scenes.json"), strict=True):
            question, answer = (turn["value"] for turn in row["conversations"])
            assert question.startswith("<image>\n")
            assert "{" not in question
            assert read.images == (row["image"],)
            assert read.messages[1]["content"] == answer
            if row["kind"] not in ("where", "spell", "yesno"):
                assert row["gold"].lower() in answer.replace(SPELLED, "").lower()


def test_same_arguments_same_bytes_and_another_seed_others(package: Path, font: Path, tmp_path: Path) -> None:
    def make(name: str, seed: int, workers: int) -> dict[str, bytes]:
        make_scenes(tmp_path / name, emoji=[package], fonts=[font], count=60, seed=seed, workers=workers)
        return {file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.j*")}

    first = make("first", 3, 2)
    rows = json.loads(first["scenes.json"])
    kinds = {row["kind"] for row in rows}
    assert len(first) == 60 + 2 + len(kinds)  # pictures, the rows and the boxes, the rows of each kind
    assert sum(len(json.loads(first[f"{kind}.json"])) for kind in kinds) == len(rows)
    assert make("again", 3, 1) == first
    assert make("other", 4, 1)["scenes.json"] != first["scenes.json"]


def test_training_shows_no_word_that_is_held_out(drawn: dict[str, Path]) -> None:
    read = {split: [row["gold"] for row in rows_of(folder) if row["kind"] == "read"] for split, folder in drawn.items()}
    assert not held_out_words() & set(read["train"])
    held_out = sum(gold in held_out_words() for gold in read["test"])
    assert 0.3 < held_out / len(read["test"]) < 0.8
    assert all(2 <= len(gold) <= 6 for golds in read.values() for gold in golds)


def test_yes_and_no_are_about_as_frequent_and_asked_of_the_same_nouns(drawn: dict[str, Path]) -> None:
    answers = Counter()
    by_noun: dict[str, set[str]] = defaultdict(set)
    for row in rows_of(drawn["train"]):
        if row["kind"] == "yesno":
            question, answer = (turn["value"] for turn in row["conversations"])
            assert answer == row["gold"]
            answers[answer] += 1
            for noun in ("dog", "cat", "apple", "car", "unicorn"):
                if f" {indefinite(noun)}" in question:
                    by_noun[noun].add(answer)
    assert 0.4 < answers["yes"] / answers.total() < 0.6
    assert all(found == {"yes", "no"} for found in by_noun.values())


def test_a_word_is_answered_as_it_is_drawn(material: Material) -> None:
    cases = set()
    for seed in range(30):
        scene = word(material, "train", random.Random(seed))
        questions = {kind: (answer, gold) for kind, _, answer, gold in scene.questions}
        says, gold = questions["read"]
        letters = says.removeprefix('It says "').removesuffix('".').split(SPELLED)
        text = "".join(letters)
        cases.add((text.isupper(), text.islower()))
        assert text.lower() == gold
        assert max(map(len, letters)) == 1, "it is learned letter by letter"
        assert questions.get("spell", ("-".join(text), gold)) == ("-".join(text), gold)
        assert [label for label, *_ in scene.boxes] == letters
    assert len(cases) == 3, "capitals, lower case and capitalised all occur"


def test_boxes_hold_what_they_name(material: Material) -> None:
    """Shapes fill their boxes, and a letter's ink lies in its own."""
    for seed in range(20):
        scene = shapes(material, "train", random.Random(seed))
        for label, left, top, right, bottom in scene.boxes:
            colour = near(scene.image, COLOURS[label.split()[0]])
            inside = colour[int(top) : int(bottom), int(left) : int(right)].sum()
            assert inside > 0.95 * colour.sum()
            assert inside > 0.15 * (right - left) * (bottom - top)
        scene = word(material, "train", random.Random(seed))
        grey = np.asarray(scene.image.convert("L"), dtype=int)
        for _, left, top, right, bottom in scene.boxes:
            assert 0 <= left < right <= SIZE + 1
            assert 0 <= top < bottom <= SIZE + 1
            letter = grey[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
            assert np.ptp(letter) > 30, "ink on paper"


def test_boxes_on_file_are_shares_of_the_picture(drawn: dict[str, Path]) -> None:
    boxes = json.loads((drawn["train"] / "boxes.json").read_text())
    assert list(boxes) == sorted({row["image"] for row in rows_of(drawn["train"])})
    for inside in boxes.values():
        assert inside
        for label, left, top, right, bottom in inside:
            assert label
            assert -0.1 < left < right < 1.1
            assert -0.1 < top < bottom < 1.1


def test_what_and_count_agree_on_one_thing(material: Material) -> None:
    for seed in range(30):
        for kind, question, answer, gold in thing(material, "test", random.Random(seed)).questions:
            if kind == "what":
                assert answer == indefinite(gold)
            if kind == "count":
                assert answer == "one"
                assert not any(noun in question for noun in MASS | PLURAL_ONLY)


def test_a_group_draws_as_many_as_it_says(material: Material) -> None:
    """Looks which cells of the 3 × 3 grid hold something."""
    counted = Counter()
    for seed in range(40):
        scene = group(material, "train", random.Random(seed))
        _, question, answer, gold = next(item for item in scene.questions if item[0] == "count")
        caption = next(answer for kind, _, answer, _ in scene.questions if kind == "caption")
        counted[gold] += 1
        assert answer == gold
        if gold != "one":
            assert f"A picture of {gold} " in caption
        drawn = near(scene.image, DISC) | near(scene.image, CAT)
        cells = [cell.mean() > 0.1 for row in np.array_split(drawn, 3) for cell in np.array_split(row, 3, axis=1)]
        assert sum(cells) == NUMBERS.index(gold) + (" and " in caption), (seed, question)
    assert set(counted) == set(NUMBERS[1:])


def test_pairs_tell_places_that_are_drawn(material: Material) -> None:
    """The cat alone is blue: its middle is where the answer says."""
    places = set()
    for seed in range(150):
        scene = pair(material, "train", random.Random(seed))
        for kind, question, answer, gold in scene.questions:
            if kind == "where" and " cat" in question:
                rows, columns = np.nonzero(near(scene.image, CAT))
                x, y = columns.mean(), rows.mean()
                found = {"left": x < 100, "right": x > 156, "top": y < 100, "bottom": y > 156, "middle": 90 < x < 166}
                assert answer.endswith(gold)
                assert found[gold], (seed, gold, x, y)
                places.add(gold)
    assert places == {"left", "right", "top", "bottom", "middle"}


def test_shapes_are_drawn_in_the_colours_that_are_answered(material: Material) -> None:
    for seed in range(20):
        scene = shapes(material, "test", random.Random(seed))
        for kind, question, answer, _ in scene.questions:
            if kind == "colour":
                assert any(noun in question for noun in SHAPES)
                assert near(scene.image, COLOURS[answer]).sum() > 200, (seed, question, answer)


def test_the_tallest_bar_is_the_tallest(material: Material) -> None:
    for seed in range(20):
        scene = chart(material, "train", random.Random(seed))
        areas = {colour: near(scene.image, rgb).sum() for colour, rgb in COLOURS.items() if colour != "white"}
        bars = {colour: area for colour, area in areas.items() if area > 300}
        golds = {question: gold for kind, question, _, gold in scene.questions if kind == "chart"}
        tallest = next(gold for question, gold in golds.items() if "tallest" in question or "highest" in question)
        shortest = next(gold for question, gold in golds.items() if "shortest" in question or "lowest" in question)
        count = next(gold for question, gold in golds.items() if "bars" in question)
        assert (tallest, shortest) == (max(bars, key=bars.__getitem__), min(bars, key=bars.__getitem__))
        assert count == NUMBERS[len(bars)]


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="blob"):
        shape("blob", (0, 0, 0))


def test_fonts_that_are_none_are_refused(package: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    material = Material(load_emoji([package]), [broken], ["bank"])
    with pytest.raises(OSError):
        word(material, "train", random.Random(0))


def near(image: Image.Image, colour: str | tuple[int, int, int]) -> np.ndarray:
    """Where the picture has this colour: bool [height, width]."""
    rgb = ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else colour
    return np.abs(np.asarray(image, dtype=int) - rgb).sum(axis=-1) < 12
