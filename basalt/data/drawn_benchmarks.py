"""Drawn scenes as files in the forms of POPE, ScienceQA and TextVQA: those benchmarks' rules on pictures of our own.

The scores say how an assistant does on drawn scenes, asked and read as these benchmarks ask and read. They do not
compare with scores on the benchmarks themselves.
"""

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from basalt.data.emoji import CATEGORY, indefinite
from basalt.data.readers import read_records
from basalt.data.response_formats import question_of
from basalt.data.scenes import COLOURS, NUMBERS, PLACES, SHAPES

PEOPLE = 10  # answers to a question of TextVQA
CHOICES = 4
WHERE = tuple(place.split()[-1] for place in PLACES)


def make_benchmarks(scenes: Path, out: Path, *, seed: int = 1) -> Path:
    """Writes `pope`, `scienceqa` and `textvqa` below `out`, each with its pictures in `images`.

    Args:
        scenes: the folder that `make_scenes` wrote, its test split.

    Returns:
        `out`. The same arguments give the same files.

    Raises:
        DataError: the folder holds no scenes.
    """
    rows = list(read_records(scenes / "scenes.json"))
    boxes = json.loads((scenes / "boxes.json").read_text())
    rng = random.Random(seed)
    _write_pope(scenes, boxes, out / "pope", rng)
    _write_scienceqa(scenes, rows, out / "scienceqa", rng)
    _write_textvqa(scenes, rows, out / "textvqa")
    return out


def _write_pope(scenes: Path, boxes: dict[str, list[list[Any]]], out: Path, rng: random.Random) -> None:
    """As POPE is made: of each thing there is, and for each one that is not there, drawn in three ways.

    At random; the commonest of the set; the ones most often together with what is there.
    """
    present = {image: _nouns([label for label, *_ in marks]) for image, marks in boxes.items()}
    present = {image: nouns for image, nouns in present.items() if nouns}
    common = Counter(noun for nouns in present.values() for noun in nouns)
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for nouns in present.values():
        for noun in nouns:
            together[noun].update(other for other in nouns if other != noun)
    names = sorted(common)
    for category in ("random", "popular", "adversarial"):
        lines = []
        for image, nouns in present.items():
            near = sum((together[noun] for noun in nouns), Counter())
            absent = rng.sample([name for name in names if name not in nouns], len(names) - len(nouns))
            if category != "random":
                absent.sort(
                    key=lambda name: (near[name] if category == "adversarial" else 0, common[name]), reverse=True
                )
            asked = [
                pair for noun, other in zip(nouns, absent, strict=False) for pair in ((noun, "yes"), (other, "no"))
            ]
            lines += [
                {"image": Path(image).name, "text": f"Is there {indefinite(noun)} in the image?", "label": label}
                for noun, label in asked
            ]
        records = [{"question_id": number, **line} for number, line in enumerate(lines, 1)]
        _write(out / f"coco_pope_{category}.json", "".join(json.dumps(record) + "\n" for record in records))
    _copy(scenes, present, out / "images")


def _nouns(labels: Sequence[str]) -> list[str]:
    """The things among what a scene shows, each once: no letters, no bars, shapes without their colour."""
    nouns = [label.rsplit(" ", 1)[-1] if label.split()[0] in COLOURS else label for label in labels]
    return list(dict.fromkeys(noun for noun in nouns if noun in CATEGORY or noun in SHAPES))


def _write_scienceqa(scenes: Path, rows: Sequence[dict[str, Any]], out: Path, rng: random.Random) -> None:
    """What, how many, which colour, where, and charts, with three wrong choices besides the right one."""
    things = sorted({row["gold"] for row in rows if row["kind"] == "what"})
    pools = {"what": things, "count": NUMBERS[1:], "colour": [*COLOURS], "where": WHERE}
    problems = {}
    for row in rows:
        kind, gold = row["kind"], row["gold"]
        pool = pools["count" if gold in NUMBERS else "colour"] if kind == "chart" else pools.get(kind)
        if pool is None:
            continue
        choices = [gold, *rng.sample([other for other in pool if other != gold], CHOICES - 1)]
        rng.shuffle(choices)
        pid = str(len(problems) + 1)
        problems[pid] = {
            "question": question_of(row), "choices": choices, "answer": choices.index(gold), "hint": "",
            "image": "image.png", "task": "closed choice", "grade": "drawn scenes", "subject": kind, "topic": kind,
            "category": kind, "skill": kind, "lecture": "", "solution": "", "split": "test",
        }  # fmt: skip
        picture = out / "images" / pid / "image.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(scenes / row["image"]) as image:
            image.save(picture)
    _write(out / "problems.json", json.dumps(problems))
    _write(out / "pid_splits.json", json.dumps({"test": list(problems)}))


def _write_textvqa(scenes: Path, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The printed words. What is printed is known, so all ten people give the same answer."""
    reading = [row for row in rows if row["kind"] == "read"]
    data = [
        {
            "question_id": number, "image_id": Path(row["image"]).stem, "question": question_of(row),
            "answers": [row["gold"]] * PEOPLE, "image_classes": [], "set_name": "val",
        }
        for number, row in enumerate(reading, 1)
    ]  # fmt: skip
    _write(out / "TextVQA_0.5.1_val.json", json.dumps({"dataset_type": "val", "data": data}))
    _copy(scenes, [row["image"] for row in reading], out / "images")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _copy(scenes: Path, images: Sequence[str] | dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        shutil.copyfile(scenes / image, folder / Path(image).name)
