"""The questions of drawn scenes, asked so that they say in which form the answer is wanted.

An assistant that only ever saw plain questions answers a benchmark in sentences, and has them counted as wrong. Some
questions that name the form, "a single word or phrase" or "the option's letter", teach it to keep to the one asked
for, and leave its other answers as they were (Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning").
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from basalt.data.readers import PLACEHOLDER, read_records

SINGLE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDE"
LISTED = ("{}. {}", "({}) {}")  # as ScienceQA's prompt and MMMU's list their options
OPEN_ENDED = ("caption", "spell")

SceneRow = dict[str, Any]


def write_formats(scenes: Path) -> None:
    """Writes `short.json` and `choice.json` beside the `scenes.json` of a folder that `make_scenes` wrote.

    Each question goes into one of them; the same rows give the same files.

    Raises:
        DataError: the folder holds no scenes.
    """
    rows = [row for row in read_records(scenes / "scenes.json") if row["kind"] not in OPEN_ENDED]
    pools = {
        kind: sorted({row["gold"] for row in rows if row["kind"] == kind}) for kind in {row["kind"] for row in rows}
    }
    short: list[SceneRow] = []
    choice: list[SceneRow] = []
    for row in rows:
        rng = random.Random(row["id"])
        if row["kind"] == "yesno" or rng.random() < 0.5:
            short.append(in_a_word(row))
        else:
            choice.append(by_letter(row, pools[_pool(row, pools)], rng))
    for kind, made in (("short", short), ("choice", choice)):
        (scenes / f"{kind}.json").write_text(json.dumps(made))


def in_a_word(row: SceneRow) -> SceneRow:
    """The question with the wish for a single word, and that word as its answer, spelled where it is read off."""
    answer = row["gold"]
    if row["kind"] == "read":
        answer = row["conversations"][1]["value"].split('"')[1]
    return _asked(row, "short", f"{question_of(row)}\n{SINGLE_WORD}", answer)


def by_letter(row: SceneRow, pool: Sequence[str], rng: random.Random) -> SceneRow:
    """The question with two to five options, and the right one's letter as its answer."""
    others = [other for other in pool if other != row["gold"]]
    options = [row["gold"], *rng.sample(others, min(rng.randint(1, len(LETTERS) - 1), len(others)))]
    rng.shuffle(options)
    form = rng.choice(LISTED)
    listed = "\n".join(form.format(letter, option) for letter, option in zip(LETTERS, options, strict=False))
    return _asked(row, "choice", f"{question_of(row)}\n{listed}\n{LETTER}", LETTERS[options.index(row["gold"])])


def _pool(row: SceneRow, pools: dict[str, list[str]]) -> str:
    """Charts are asked for numbers and for colours."""
    if row["kind"] != "chart":
        return row["kind"]
    return next((kind for kind in ("count", "colour") if row["gold"] in pools.get(kind, ())), "chart")


def question_of(row: SceneRow) -> str:
    """What a scene's row asks, without the image's place."""
    return row["conversations"][0]["value"].removeprefix(f"{PLACEHOLDER}\n")


def _asked(row: SceneRow, kind: str, question: str, answer: str) -> SceneRow:
    turns = [{"from": "human", "value": f"{PLACEHOLDER}\n{question}"}, {"from": "gpt", "value": answer}]
    return row | {"id": f"{row['id']}-{kind}", "kind": kind, "conversations": turns}
