"""The cache of tower features: when it is known again, and what it does with images that are not there."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from basalt.data.readers import ImageSource
from basalt.train.features import cached_features
from tests.train.conftest import TOWER


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    return folder


def test_the_same_images_are_computed_once_and_changed_ones_again(images: Path, tmp_path: Path) -> None:
    def caches() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    first = cached_features(TOWER, ImageSource(images), ["red.png", "blue.png"], tmp_path / "cache")
    again = cached_features(TOWER, ImageSource(images), ["blue.png", "red.png", "red.png"], tmp_path / "cache")
    assert caches() == 1
    assert torch.equal(first["red.png"], again["red.png"])
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).convert("RGB").save(images / "red.png")
    changed = cached_features(TOWER, ImageSource(images), ["red.png", "blue.png"], tmp_path / "cache")
    assert caches() == 2
    assert not torch.equal(changed["red.png"], first["red.png"])
    assert torch.equal(changed["blue.png"], first["blue.png"])


def test_images_that_are_missing_or_broken_are_named_and_nothing_takes_their_place(
    images: Path, tmp_path: Path
) -> None:
    (images / "broken.png").write_bytes(b"not a picture")
    names = ["red.png", "broken.png", "gone.png"]
    cache = cached_features(TOWER, ImageSource(images), names, tmp_path / "cache")
    assert list(cache.rows) == ["red.png"]
    assert set(cache.broken) == {"broken.png", "gone.png"}
    assert "gone.png" not in cache
    assert "no image 'gone.png'" in cache.broken["gone.png"]
