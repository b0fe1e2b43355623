"""Drawn scenes' questions that name the form of their answer."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from basalt.data.preprocess import SPELLED
from basalt.data.readers import read_rows
from basalt.data.response_formats import LETTER, LETTERS, SINGLE_WORD, write_formats
from basalt.data.scenes import make_scenes
from basalt.eval import scienceqa, textvqa


@pytest.fixture(scope="module")
def scenes(package: Path, font: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, emoji=[package], fonts=[font], count=300, seed=3)
    write_formats(folder)
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def turns(row: dict[str, Any]) -> tuple[str, str]:
    question, answer = (turn["value"] for turn in row["conversations"])
    return question, answer


def test_each_question_is_asked_again_in_one_form(scenes: Path) -> None:
    asked = {row["id"]: row for row in rows_of(scenes / "scenes.json")}
    again = [row for name in ("short", "choice") for row in rows_of(scenes / f"{name}.json")]
    assert {row["id"].rsplit("-", 1)[0] for row in again} == {
        name for name, row in asked.items() if row["kind"] not in ("caption", "spell")
    }
    assert len(again) == len({row["id"] for row in again})
    for row in again:
        before = asked[row["id"].rsplit("-", 1)[0]]
        assert turns(row)[0].startswith(turns(before)[0] + "\n") and row["image"] == before["image"]
    assert all(row.images for name in ("short", "choice") for row in read_rows(scenes / f"{name}.json"))


def test_a_single_word_is_what_is_asked_for(scenes: Path) -> None:
    kinds = {row["id"]: row["kind"] for row in rows_of(scenes / "scenes.json")}
    for row in rows_of(scenes / "short.json"):
        question, answer = turns(row)
        assert question.endswith(f"\n{SINGLE_WORD}")
        assert answer.replace(SPELLED, "").lower() == row["gold"]
        assert (SPELLED in answer) == (kinds[row["id"].removesuffix("-short")] == "read")


def test_the_letter_is_the_right_options_and_any_letter_may_be_right(scenes: Path) -> None:
    letters = Counter[str]()
    for row in rows_of(scenes / "choice.json"):
        question, answer = turns(row)
        *_, instruction = lines = question.split("\n")
        listed = [line for line in lines if line[:3] in {f"{letter}. " for letter in LETTERS} or line[:1] == "("]
        assert instruction == LETTER and 2 <= len(listed) <= len(LETTERS)
        options = [line.split(" ", 1)[1] for line in listed]
        assert len(set(options)) == len(options)
        assert options[LETTERS.index(answer)] == row["gold"]
        letters[answer] += 1
    assert set(letters) == set(LETTERS)


def test_the_same_rows_give_the_same_files(scenes: Path) -> None:
    before = (scenes / "choice.json").read_bytes()
    write_formats(scenes)
    assert (scenes / "choice.json").read_bytes() == before


def test_the_words_are_the_benchmarks(scenes: Path) -> None:
    assert LETTER == scienceqa.INSTRUCTION
    assert f"\n{SINGLE_WORD}" == textvqa._INSTRUCTION
