"""What the check tells of a recipe's data, and that it is what training does with it."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from basalt.assistants import TowerSpec
from basalt.cli import app
from basalt.data.check import Report, check_recipe
from basalt.train.recipe import DataSource, LoRA, Recipe, RecipeError
from tests.tiny_lm import IMAGE_TOKEN_ID, make_lm

TOWER = TowerSpec(kind="siglip", id="none", image_size=64, tokens=4, width=32, fit="resize")
COLOURS = ("red", "green", "blue", "white", "black", "grey")


def png(colour: str) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(held, "PNG")
    return held.getvalue()


def about(image: str | None, answer: str = "A colour.") -> dict[str, Any]:
    asked = "Hello!" if image is None else "<image>\nWhat is it?"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} if image is None else {"image": image, "conversations": turns}


@pytest.fixture(scope="module")
def base_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lm(tmp_path_factory.mktemp("base") / "tiny-lm")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(png(colour))
    return folder


def recipe_of(base_lm: Path, *sources: DataSource, **fields: Any) -> Recipe:
    given = {
        "tower": TOWER,
        "base_lm": base_lm,
        "image_token_id": IMAGE_TOKEN_ID,
        "projector_hidden": 48,
        "data": list(sources),
        "projector_learning_rate": 1e-3,
        "dtype": "bfloat16",
        "steps": 40,
        "rows_per_pass": 2,
        "passes_per_step": 2,
        "row_length": 128,
    }
    return Recipe(**(given | fields))


def written(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_a_good_data_set(base_lm: Path, images: Path, tmp_path: Path) -> None:
    records = [about(f"{colour}.png", f"It is {colour}.") for colour in COLOURS] + [about(None)]
    source = DataSource(rows=written(tmp_path / "a.json", records), images=images)
    report = check_recipe(recipe_of(base_lm, source, held_out=source))
    assert report.problems == []
    training, held_out = report.sources
    assert (training.rows, training.usable, training.duplicates, training.dropped) == (7, 7, 0, [])
    assert training.images.model_dump() == {"distinct": 6, "missing": 0, "broken": 0}
    assert training.tokens is not None
    assert training.tokens.median <= training.tokens.p95 <= training.tokens.longest
    assert held_out == training.model_copy(update={"held_out": True})
    epoch = report.epoch
    assert epoch is not None
    assert epoch.groups == 7
    assert epoch.packed_rows >= epoch.passes >= epoch.steps >= 1
    assert epoch.epochs == 40 / epoch.steps
    assert 0 <= epoch.padding < 0.5
    answers = [record["conversations"][1]["value"] for record in records]
    assert epoch.supervised_tokens == sum(len(answer) + 1 for answer in answers)  # a token a byte, and the end's
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_memory_is_arithmetic_on_real_shapes(base_lm: Path, images: Path, tmp_path: Path) -> None:
    source = DataSource(rows=written(tmp_path / "a.json", [about("red.png")]), images=images)
    one, other = (check_recipe(recipe_of(base_lm, source, lora=lora)).memory for lora in (None, LoRA(rank=4, alpha=8)))
    assert one is not None
    assert other is not None
    vocabulary, width = 16 + 1 + 256, 64
    attention, mlp = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128
    assert one.base_lm == 2 * (vocabulary * width + width + 2 * (attention + mlp + 2 * width))
    assert one.features_on_disk == 2 * 4 * 32
    projector = 33 * 48 + 49 * 64
    assert one.trained == 20 * projector
    assert other.trained == 20 * (projector + 4 * 2 * (2 * 128 + 2 * 96 + 3 * 192))
    full = check_recipe(recipe_of(base_lm, source, dtype="float32")).memory
    assert full is not None
    assert (full.base_lm, full.features_on_disk) == (2 * one.base_lm, one.features_on_disk)
    assert full.trained == 24 * projector


def test_everything_that_is_dropped_is_told(base_lm: Path, images: Path, tmp_path: Path) -> None:
    (images / "broken.png").write_bytes(b"not a picture")
    records = [
        about("red.png"),
        about("red.png"),
        about("broken.png"),
        about("missing.png"),
        about("red.png", " "),
        about("green.png", "A colour. " * 20),
        *[about("red.png") | {"image": None}] * 4,
    ]
    source = DataSource(rows=written(tmp_path / "a.json", records), images=images)
    report = check_recipe(recipe_of(base_lm, source))
    (found,) = report.sources
    assert (found.rows, found.usable, found.duplicates, found.too_long, found.unlabelled) == (10, 2, 1, 1, 0)
    assert found.images.model_dump() == {"distinct": 4, "missing": 1, "broken": 1}
    dropped = {lost.reason: (lost.count, len(lost.examples)) for lost in found.dropped}
    assert dropped == {
        "images and <image> placeholders do not match": (4, 3),
        "no answer to learn": (1, 1),
        "an image is missing or cannot be decoded": (2, 2),
        "longer than row_length": (1, 1),
    }
    assert found.problem is not None
    assert report.problems == [found.problem]
    assert "of 10 rows, 8 dropped" in found.problem


def test_images_need_not_be_decoded(base_lm: Path, images: Path, tmp_path: Path) -> None:
    (images / "red.png").write_bytes(b"not a picture")
    records = [about("red.png"), about("missing.png"), *[about("green.png", f"It is {n}.") for n in range(30)]]
    source = DataSource(rows=written(tmp_path / "a.json", records), images=images)
    report = check_recipe(recipe_of(base_lm, source), images=False)
    assert report.sources[0].images.model_dump() == {"distinct": 3, "missing": 1, "broken": None}
    assert report.problems == []


def test_rows_with_the_same_images_inside_are_duplicates(base_lm: Path, tmp_path: Path) -> None:
    held = [{"bytes": png(colour), "path": None} for colour in ("red", "green", "red")]
    pq.write_table(pa.table({"image": held, "caption": ["A colour."] * 3}), tmp_path / "a.parquet")
    recipe = recipe_of(base_lm, DataSource(rows=tmp_path / "a.parquet"))
    assert check_recipe(recipe).sources[0].duplicates == 1
    assert check_recipe(recipe, images=False).sources[0].duplicates == 0


def test_a_file_that_cannot_be_read_does_not_hide_the_others(base_lm: Path, images: Path, tmp_path: Path) -> None:
    good = DataSource(rows=written(tmp_path / "a.json", [about("red.png")]), images=images)
    (tmp_path / "b.json").write_text("{")
    boxes = good.model_copy(update={"boxes": tmp_path / "boxes.json"})
    report = check_recipe(recipe_of(base_lm, good, DataSource(rows=tmp_path / "b.json"), boxes))
    assert [source.usable for source in report.sources] == [1, 0, 0]
    assert len(report.problems) == 2
    assert "b.json is not a JSON list" in report.problems[0]
    assert "no such file of boxes" in report.problems[1]
    assert report.epoch is not None


def test_a_recipe_without_its_base_lm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="base_lm"):
        check_recipe(recipe_of(tmp_path, DataSource(rows=tmp_path)))


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8)])
def test_real_steps_are_measured(base_lm: Path, images: Path, tmp_path: Path, lora: LoRA | None) -> None:
    records = [about(f"{colour}.png") for colour in COLOURS] + [about(None)]
    source = DataSource(rows=written(tmp_path / "a.json", records), images=images)
    measured = check_recipe(recipe_of(base_lm, source, lora=lora), measure=True).measured
    assert measured is not None
    assert measured.seconds == 40 * measured.seconds_per_step > 0
    assert measured.tokens_per_second > 0
    assert measured.peak_memory > 2**20


def test_the_command(base_lm: Path, images: Path, tmp_path: Path) -> None:
    good = [about(f"{colour}.png") for colour in COLOURS]
    source = DataSource(rows=written(tmp_path / "a.json", good), images=images)
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(json.loads(recipe_of(base_lm, source).model_dump_json())))
    run = CliRunner().invoke
    shown = run(app, ["data", "check", str(config)])
    assert shown.exit_code == 0, shown.output
    assert "an epoch: 6 groups" in shown.stdout
    assert "an estimate" in shown.stdout
    report = Report.model_validate_json(run(app, ["data", "check", str(config), "--json", "--no-images"]).stdout)
    assert report.sources[0].images.broken is None
    written(source.rows, [*good, about("missing.png")])
    stopped = run(app, ["data", "check", str(config)])
    assert stopped.exit_code == 1
    assert "training would stop" in stopped.stdout
    assert run(app, ["data", "check", str(tmp_path / "none.yaml")]).exit_code == 1
