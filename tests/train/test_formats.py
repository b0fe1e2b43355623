"""Stage 1 from every format: the same content is the same training, wherever it stands."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from basalt.data.check import check_recipe
from basalt.data.preprocess import TEMPLATES, Tokenizer
from basalt.train.data import Source, prepare
from basalt.train.recipe import DataSource, Recipe
from basalt.train.stage1_align import train_stage1
from tests.tiny_lm import IMAGE_TOKEN_ID, make_tokenizer

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def content(data: Path) -> list[tuple[str, bytes, str]]:
    """Name, picture and answer; the names sort as the rows."""
    pictures = sorted((data / "images").iterdir())
    return [(path.name, path.read_bytes(), f"A {path.stem}.") for path in pictures]


@pytest.fixture(scope="module")
def formats(content: list[tuple[str, bytes, str]], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Format → the content in it."""
    folder = tmp_path_factory.mktemp("formats")
    llava = [{"image": name, "conversations": _turns(answer)} for name, _, answer in content]
    (folder / "llava.json").write_text(json.dumps(llava))

    urls = ["data:image/png;base64," + base64.b64encode(picture).decode() for _, picture, _ in content]
    openai = [{"messages": _messages(url, answer)} for url, (_, _, answer) in zip(urls, content, strict=True)]
    (folder / "openai.jsonl").write_text("\n".join(map(json.dumps, openai)))

    columns = {
        "image": [{"bytes": picture, "path": name} for name, picture, _ in content],
        "question": [QUESTION] * len(content),
        "answer": [answer for _, _, answer in content],
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=4)

    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as archive:
            for key, picture, answer in content[shard * 3 : shard * 3 + 3]:
                record = json.dumps({"conversations": _turns(answer)}).encode()
                for suffix, held in ((".png", picture), (".json", record)):
                    member = tarfile.TarInfo(key.removesuffix(".png") + suffix)
                    member.size = len(held)
                    archive.addfile(member, io.BytesIO(held))
    return {
        "llava": DataSource(rows=folder / "llava.json", images=data / "images"),
        "openai": DataSource(rows=folder / "openai.jsonl"),
        "parquet": DataSource(rows=folder / "rows.parquet"),
        "webdataset": DataSource(rows=folder / "shard-{0..1}.tar"),
    }


def _turns(answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]


def _messages(url: str, answer: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def _prepared(stage1: Recipe, *sources: DataSource) -> list[Source]:
    template = (TEMPLATES / stage1.chat_template).read_text()
    tokenizer = Tokenizer(make_tokenizer(), template, IMAGE_TOKEN_ID, stage1.tower.tokens)
    return prepare(sources, stage1, tokenizer)


def _recipe(stage1: Recipe, source: DataSource) -> Recipe:
    return stage1.model_copy(update={"data": [source], "held_out": source, "steps": 3})


@pytest.mark.parametrize("name", ["openai", "parquet", "webdataset"])
def test_the_same_content_is_the_same_groups(stage1: Recipe, formats: dict[str, DataSource], name: str) -> None:
    expected, found = (_prepared(stage1, formats[which])[0] for which in ("llava", name))
    assert len(found.groups) == 6
    assert [(group.prefix, group.branches) for group in found.groups] == [
        (group.prefix, group.branches) for group in expected.groups
    ]
    for mine, theirs in zip(found.groups, expected.groups, strict=True):
        assert found.features is not None
        assert expected.features is not None
        features = found.features[mine.images[0]], expected.features[theirs.images[0]]
        torch.testing.assert_close(*features, rtol=0.02, atol=0.02)


def test_the_same_content_is_the_same_training(stage1: Recipe, formats: dict[str, DataSource], tmp_path: Path) -> None:
    logs: dict[str, list[float]] = {}
    for name, source in formats.items():
        train_stage1(_recipe(stage1, source), tmp_path / name)
        last = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        assert last["step"] == 3
        logs[name] = [last["loss"], last["held_out_loss"], last["gradient_norm"]]
    # Not to the last bit: a CPU adds up in an order that depends on where in memory its numbers happen to lie.
    assert all(figures == pytest.approx(logs["llava"], rel=5e-3) for figures in logs.values())


def test_tower_features_of_images_inside_are_computed_once(
    stage1: Recipe, formats: dict[str, DataSource], tmp_path: Path
) -> None:
    recipe = stage1.model_copy(update={"features": tmp_path})
    for _ in range(2):
        for source in formats.values():
            _prepared(recipe, source)
    assert len(list(tmp_path.iterdir())) == len(formats)


def test_the_check_counts_as_training_does(stage1: Recipe, formats: dict[str, DataSource]) -> None:
    for source in formats.values():
        report = check_recipe(_recipe(stage1, source))
        assert report.problems == []
        assert report.epoch is not None
        assert report.epoch.groups == len(_prepared(stage1, source)[0].groups)


def test_rows_about_one_folder_share_its_features(stage1: Recipe, data: Path, tmp_path: Path) -> None:
    whole, some = data / "captions.jsonl", tmp_path / "some.jsonl"
    some.write_text("\n".join(whole.read_text().splitlines()[:2]))
    sources = (DataSource(rows=rows, images=data / "images") for rows in (some, whole))
    recipe = stage1.model_copy(update={"features": tmp_path / "features"})
    fewer, all_of_them = _prepared(recipe, *sources)
    assert fewer.features is all_of_them.features
    assert len(list((tmp_path / "features").iterdir())) == 1
    assert (len(fewer.groups), len(all_of_them.groups)) == (2, 6)
