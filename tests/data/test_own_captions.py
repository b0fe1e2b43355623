"""Photos that an assistant captions itself: what agrees with the references is kept, with the view it is of."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from basalt.assistants import load_assistant, seal
from basalt.cli import app
from basalt.data.images import decode_image
from basalt.data.own_captions import caption_photos
from basalt.data.preprocess import TEMPLATES
from basalt.data.readers import DataError, ImageSource, read_rows
from basalt.eval.captions import PROMPT
from basalt.model.assistant import LocalAssistant
from tests.tiny import make_assistant, make_tower
from tests.tiny_lm import make_lm

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def base_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lm(tmp_path_factory.mktemp("base") / "tiny-lm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    directory = make_assistant(root, "cat", make_tower(root / "tower"))
    manifest = load_assistant(directory).manifest
    shutil.copy(TEMPLATES / "chatml.jinja", directory / "chat_template.jinja")
    return seal(directory, manifest).directory


@pytest.fixture
def photos(model: Path, base_lm: Path, tmp_path: Path) -> Path:
    """Plain ones, the same from any view. The first two have what the assistant says of them as a reference."""
    (tmp_path / "images").mkdir()
    records = []
    for number, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (48, 40), colour)
        picture.save(tmp_path / "images" / f"{colour}.png")
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
        said = LocalAssistant(load_assistant(model), base_lm).answer([(asked, [picture])], max_new_tokens=32)[0]
        assert said
        captions = [said, f"{colour} all over"] if number < 2 else ["nothing of the kind"]
        records.append({"image": f"{colour}.png", "captions": captions})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.mark.parametrize("candidates", [1, 3])
def test_captions_that_agree_with_the_references_are_kept(
    model: Path, base_lm: Path, photos: Path, candidates: int
) -> None:
    out = photos / "own"
    rows, images = photos / "rows.jsonl", photos / "images"
    assert caption_photos(model, base_lm, rows, images, out, candidates=candidates) == 2
    kept = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    said = {record["image"]: record["captions"] for record in map(json.loads, rows.read_text().splitlines())}
    archive = ImageSource(out / "images.tar")
    seen = set()
    for record in kept:
        red, green, blue = decode_image(archive.read(record["image"])).getpixel((9, 9))  # type: ignore[misc]
        colour = COLOURS[max(enumerate((red, green, blue)), key=lambda each: each[1])[0]]
        assert record["captions"] == said[f"{colour}.png"][:1]
        seen.add(colour)
    assert seen == {"red", "green"}
    assert len(list(read_rows(out / "captions.jsonl"))) == 2


def test_a_view_is_mirrored_and_a_part(model: Path, base_lm: Path, photos: Path) -> None:
    halves = Image.new("RGB", (100, 40), "red")
    halves.paste("blue", (50, 0, 100, 40))
    halves.save(photos / "images" / "red.png")
    (photos / "rows.jsonl").write_text((photos / "rows.jsonl").read_text().splitlines()[0])
    out = photos / "own"
    caption_photos(model, base_lm, photos / "rows.jsonl", photos / "images", out)
    for record in map(json.loads, (out / "captions.jsonl").read_text().splitlines()):
        view = decode_image(ImageSource(out / "images.tar").read(record["image"]))
        assert 85 <= view.width <= 100
        assert view.getpixel((2, 9))[2] > 200  # type: ignore[index]


def test_no_photos_and_no_images_are_told(model: Path, base_lm: Path, photos: Path) -> None:
    (photos / "none.jsonl").write_text("\n")
    with pytest.raises(DataError):
        caption_photos(model, base_lm, photos / "none.jsonl", photos / "images", photos / "own")
    (photos / "images" / "red.png").unlink()
    arguments = ["--rows", str(photos / "rows.jsonl"), "--images", str(photos / "images"), "--out", str(photos / "own")]
    told = CliRunner().invoke(
        app, ["data", "make-captions", *arguments, "--model", str(model), "--base-lm", str(base_lm)]
    )
    assert told.exit_code == 1
    assert "red.png" in told.output
