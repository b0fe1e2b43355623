"""A tiny base LM and six drawn pictures with captions, and recipes over them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from basalt.assistants import TowerSpec
from basalt.train.recipe import DataSource, LoRA, Recipe
from basalt.train.stage1_align import train_stage1
from basalt.train.stage2_instruct import train_stage2
from tests.tiny_lm import IMAGE_TOKEN_ID, make_lm

TOWER = TowerSpec(
    kind="efficientnet-lite",
    id="efficientnet-lite2",
    image_size=64,
    tokens=4,
    width=2532,
    fit="resize",
    coordinates=True,
)
PICTURES = [(colour, shape) for colour in ("red", "green", "blue") for shape in ("ellipse", "rectangle")]


@pytest.fixture(scope="session")
def base_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lm(tmp_path_factory.mktemp("base") / "tiny-lm")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/`, `captions.jsonl` of all pictures and `chat.json`."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "images").mkdir()
    captions = []
    for colour, shape in PICTURES:
        image = Image.new("RGB", (64, 48), "white")
        getattr(ImageDraw.Draw(image), shape)((12, 8, 52, 40), fill=colour)
        name = f"{colour}-{shape}.png"
        image.save(directory / "images" / name)
        captions.append({"image": name, "captions": [f"a {colour} {shape} .", f"It is {colour}."]})
    (directory / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    chat = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hi."}]
    (directory / "chat.json").write_text(json.dumps([{"conversations": chat}]))
    return directory


@pytest.fixture(scope="session")
def stage1(base_lm: Path, data: Path) -> Recipe:
    captions: dict[str, Any] = {"rows": data / "captions.jsonl", "images": data / "images"}
    return Recipe(
        tower=TOWER,
        base_lm=base_lm,
        image_token_id=IMAGE_TOKEN_ID,
        projector_hidden=48,
        data=[DataSource(**captions)],
        held_out=DataSource(**captions),
        projector_learning_rate=3e-3,
        steps=40,
        rows_per_pass=2,
        passes_per_step=2,
        row_length=160,
        checkpoint_every=4,
        features=data / "features",
    )


@pytest.fixture(scope="session")
def stage2(stage1: Recipe, data: Path) -> Recipe:
    """Needs its `start`."""
    chat = DataSource(rows=data / "chat.json")
    update = {"data": [*stage1.data, chat], "lora": LoRA(rank=4, alpha=8, learning_rate=2e-3), "steps": 10}
    return stage1.model_copy(update=update)


@pytest.fixture(scope="session")
def aligned(stage1: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage 1."""
    run = tmp_path_factory.mktemp("runs") / "stage1"
    train_stage1(stage1, run)
    return run


@pytest.fixture(scope="session")
def instructed(stage2: Recipe, aligned: Path) -> Path:
    """A finished stage 2."""
    run = aligned.parent / "stage2"
    train_stage2(stage2.model_copy(update={"start": aligned}), run)
    return run
