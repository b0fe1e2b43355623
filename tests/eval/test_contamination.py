"""Contamination as it happens: copied, scaled and compressed pictures, copied texts; and what only looks like it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from typer.testing import CliRunner

from basalt.cli import app
from basalt.data.readers import DataSet
from basalt.eval.benchmark import Sample
from basalt.eval.contamination import Report, check

LONG = "Which of the following parts of the engine in the picture turns the fuel's heat into motion of the shaft?"


def picture(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Shapes of its own on a smooth ground: no two are alike."""
    draw = np.random.default_rng(seed)
    ground = Image.fromarray(draw.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(ground)
    for _ in range(6):
        x, y, w, h = (int(value) for value in draw.integers(10, 200, 4))
        pen.ellipse((x, y, x + w, y + h), fill=tuple(int(value) for value in draw.integers(0, 255, 3)))
    return ground


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(id: str, image: bytes, prompt: str = "What is this?") -> Sample:
    return Sample(id, prompt, ("x",), images=(lambda: image,))


def training(folder: Path, pictures: dict[str, bytes], questions: dict[str, str] | None = None) -> DataSet:
    (folder / "images").mkdir()
    rows = []
    for name, data in pictures.items():
        (folder / "images" / name).write_bytes(data)
        question = (questions or {}).get(name, "Say what you see.")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "A thing."}]
        rows.append({"id": name, "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return DataSet(folder / "rows.json", folder / "images")


def kinds(report: Report) -> dict[str, str]:
    return {one.sample: one.kind for one in report.found}


def test_copies_of_pictures_are_found_however_they_were_stored(tmp_path: Path) -> None:
    samples = [sample(str(number), encoded(picture(number))) for number in range(40)]
    stored = {
        "same.png": encoded(picture(0)),
        "small.jpg": encoded(picture(1).resize((160, 120)), "JPEG", quality=60),
        "soft.webp": encoded(picture(2).filter(ImageFilter.GaussianBlur(1)), "WEBP", quality=50),
        "wide.png": encoded(picture(3).resize((480, 240))),
        "broken.png": encoded(picture(4))[:200],
    } | {f"other-{number}.jpg": encoded(picture(1000 + number), "JPEG") for number in range(100)}
    report = check(samples, [("mine", training(tmp_path, stored))])
    assert kinds(report) == {"0": "same image", "1": "like image", "2": "like image", "3": "like image"}
    assert report.rows == report.images == 105
    assert len(report.unread) == 1 and "truncated or damaged" in report.unread[0]
    assert all(one.where.startswith("mine, row ") for one in report.found)


def test_flat_and_like_drawn_pictures_are_no_copies(tmp_path: Path) -> None:
    def chart(heights: list[int]) -> bytes:
        image = Image.new("RGB", (300, 300), "white")
        for number, height in enumerate(heights):
            ImageDraw.Draw(image).rectangle((20 + 50 * number, 280 - height, 55 + 50 * number, 280), fill="navy")
        return encoded(image)

    samples = [
        sample("white", encoded(Image.new("RGB", (64, 64), "white"))),
        sample("chart", chart([250, 40, 130, 90, 200])),
    ]
    stored = {"grey.png": encoded(Image.new("RGB", (80, 64), "#ddd")), "chart.png": chart([30, 220, 90, 240, 60])}
    assert not check(samples, [("mine", training(tmp_path, stored))]).found


def test_copied_texts_are_found_and_phrases_of_the_benchmark_are_not(tmp_path: Path) -> None:
    phrase = "Look at the picture with care and then answer with the option's letter from the given choices directly."
    samples = [sample(str(number), encoded(picture(number)), f"Question {number}. {phrase}") for number in range(20)]
    samples.append(sample("copied", encoded(picture(50)), f"{LONG}\n(A) piston (B) valve"))
    samples.append(sample("short", encoded(picture(51)), "Is there a dog?"))
    stored = {f"{number}.png": encoded(picture(100 + number)) for number in range(3)}
    asked = {"0.png": phrase, "1.png": f"So: {LONG.upper()} Explain.", "2.png": "Is there a dog?"}
    report = check(samples, [("mine", training(tmp_path, stored, asked))])
    assert kinds(report) == {"copied": "text"}
    assert report.short == ["short"]
    assert report.as_json()["by_kind"] == {"same image": 0, "like image": 0, "text": 1}


def test_the_command_scores_what_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(4):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(encoded(picture(number)))
        rows.append({"id": str(number), "image": f"{number}.png", "question": "What?", "answer": "yes"})
    (tmp_path / "own.json").write_text(json.dumps(rows))
    answers = "".join(json.dumps({"id": str(n), "prediction": "yes" if n < 2 else "no"}) + "\n" for n in range(4))
    (tmp_path / "answers.jsonl").write_text(answers)
    training(tmp_path, {"copy.png": encoded(picture(0))})
    command = "eval contamination vqa --data own.json --images pictures --rows rows.json --rows-images images"
    told = CliRunner().invoke(app, [*command.split(), "--predictions", "answers.jsonl"])
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert report["contaminated"] == 1
    assert report["scores"]["exact"]["accuracy"] == 50 and report["clean_scores"]["exact"]["accuracy"] == pytest.approx(
        100 / 3
    )
