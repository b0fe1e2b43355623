"""Makes a folder to look through a run's samples in a browser: questions with pictures, answers, rules and flips.

The folder needs nothing but itself: `index.html` with all texts in it, and the pictures as files.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from basalt.data.readers import DataError
from basalt.eval.benchmark import Sample, Scored
from basalt.eval.results import StoredResult, shared
from basalt.eval.run import stored_task

PAGE = Path(__file__).with_name("browse.html")


def browse(
    result: StoredResult,
    out: Path,
    *,
    against: StoredResult | None = None,
    data: Path | None = None,
    images: Path | None = None,
    tell: Callable[[int, int], None] = lambda _, __: None,
) -> None:
    """Writes the folder.

    Args:
        against: an older version, for what has become wrong or right.
        data, images: the benchmark's files, if they are no longer where they were asked from.
        tell: is given how many samples are written, and of how many.

    Raises:
        DataError: the result has no score, the two cannot be compared, or the data is not what was asked.
    """
    before: dict[str, Scored] = {}
    after = result.scored
    if against is not None:
        older, after = shared(against, result)
        before = {one.sample.id: one for one in older}
    elif not after:
        raise DataError(f"{result.directory} has no score: {result.scores['why'] or result.scores['status']}")
    task, _ = stored_task(result.directory, data, images)
    # The pictures are shown here though a blind model was not.
    samples = {sample.id: sample for sample in replace(task, blind=False).samples()}
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for number, one in enumerate(after):
        records.append(_record(one, before.get(one.sample.id), samples[one.sample.id], out))
        tell(number + 1, len(after))
    kinds = {rule["name"]: rule for rules in result.scores["rules"].values() for rule in rules}
    told = {
        "benchmark": result.benchmark,
        "name": result.name,
        "against": against.name if against else None,
        "ways": result.ways,
        "rules": {name: f"{rule['kind']}: {rule['meaning']}" for name, rule in kinds.items()},
        "samples": records,
    }
    # Answers are anybody's text: none of it may end the script, or begin a comment in it.
    text = json.dumps(told, ensure_ascii=False).replace("<", "\\u003c")
    page = PAGE.read_text(encoding="utf-8").replace("TITLE", _escaped(f"{result.benchmark}: {result.name}"))
    (out / "index.html").write_text(page.replace("/*DATA*/", text), encoding="utf-8", errors="replace")


def _record(one: Scored, before: Scored | None, sample: Sample, out: Path) -> dict[str, Any]:
    pictures, unread = [], []
    for read in sample.images:
        try:
            pictures.append(_save(read(), out / "images"))
        except (DataError, OSError, UnidentifiedImageError) as error:
            unread.append(str(error))
    return {
        "id": sample.id,
        "prompt": sample.prompt,
        "gold": sample.gold,
        "groups": sample.groups,
        "pictures": pictures,
        "unread": unread,
        "now": _answer(one),
        "before": _answer(before) if before else None,
    }


def _answer(one: Scored) -> dict[str, Any]:
    verdicts = {
        way: {"score": verdict.score, "rule": verdict.rule.name, "read": verdict.answer}
        for way, verdict in one.verdicts.items()
    }
    return {"text": one.prediction, "verdicts": verdicts}


def _save(data: bytes, folder: Path) -> str:
    """The picture as a file named by its content: one that several questions share is there once."""
    with Image.open(io.BytesIO(data)) as image:
        suffix = (image.format or "bin").lower()
    path = folder / f"{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        path.write_bytes(data)
    return f"images/{path.name}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
