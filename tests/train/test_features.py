"""The cache of tower features: when it is known again, and what it does with images that are not there."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from basalt.data.readers import DataError, ImageSource
from basalt.train import features as computing
from basalt.train.alone import LOCK
from basalt.train.features import FEATURES, INDEX, FeatureCache, LiveFeatures, cached_features, worth_keeping
from basalt.train.stop import Stopped
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


def test_features_computed_each_time_are_those_that_are_kept(images: Path, tmp_path: Path) -> None:
    names = ["red.png", "blue.png"]
    for dtype in (torch.float32, torch.bfloat16):
        kept = cached_features(TOWER, ImageSource(images), names, tmp_path / "cache", dtype)
        live = LiveFeatures(TOWER, ImageSource(images), names, dtype)
        for name, features in live.of(names).items():
            assert features.dtype == torch.bfloat16
            torch.testing.assert_close(features, kept[name])


def test_a_broken_image_found_on_the_way_is_left_out_until_there_are_too_many(images: Path) -> None:
    for number in range(18):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(images / f"{number}.png")
    live = LiveFeatures(TOWER, ImageSource(images), [path.name for path in images.iterdir()], torch.float32)
    (images / "1.png").write_bytes(b"not a picture")
    assert list(live.of(["red.png", "1.png"])) == ["red.png"]
    assert list(live.of(["1.png"])) == []
    assert set(live.broken) == {"1.png"}
    (images / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 images are broken, 2\.png the last"):
        live.of(["2.png"])


@pytest.mark.parametrize(("free", "uses", "worth"), [(10**9, 3, True), (10**4, 3, False), (10**9, 1, False)])
def test_features_are_kept_where_they_fit_and_are_needed_again(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int,
    uses: float,
    worth: bool,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    root = tmp_path / "cache"
    assert worth_keeping(TOWER, ImageSource(images), ["red.png"], root, torch.float32, uses) == worth
    assert ("kept" in caplog.text) == worth


def test_a_cache_that_was_stopped_or_killed_is_gone_on_with(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing, "BATCH", 2)
    for number in range(7):
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(images / f"{number}.png")
    (images / "3.png").write_bytes(b"not a picture")
    names = [f"{number}.png" for number in range(7)]
    whole = cached_features(TOWER, ImageSource(images), names, tmp_path / "whole")
    asked = iter([False, True])
    told: list[int] = []
    with pytest.raises(Stopped, match="4 of 7"):
        cached_features(
            TOWER, ImageSource(images), names, tmp_path / "cache", stop=lambda: next(asked), tell=told.append
        )
    (begun,) = (tmp_path / "cache").iterdir()
    with (begun / FEATURES).open("ab") as file:  # as a kill leaves it in the middle of a batch
        file.write(b"half a row")
    seen: list[str] = []
    decode = computing.decode_image
    monkeypatch.setattr(computing, "decode_image", lambda data: seen.append("one") or decode(data))
    again = cached_features(TOWER, ImageSource(images), names, tmp_path / "cache", tell=told.append)
    assert told == [2, 4, 6, 7]
    assert len(seen) == 3  # the others were not computed again
    assert (again.rows, again.broken.keys()) == (whole.rows, {"3.png"})
    assert all(torch.equal(again[name], whole[name]) for name in whole.rows)
    assert sorted(path.name for path in begun.iterdir()) == [FEATURES, INDEX, LOCK]


def test_a_cache_larger_than_memory_can_be_read(tmp_path: Path) -> None:
    spec = TOWER.model_copy(update={"tokens": 2**14, "width": 2**24})  # one image of 512 GiB, none of it on the disk
    (tmp_path / INDEX).write_text(json.dumps({"tower": spec.model_dump(), "rows": {"red.png": 0}, "broken": {}}))
    with (tmp_path / FEATURES).open("wb") as file:
        file.truncate(2**39)
    assert float(FeatureCache(tmp_path)["red.png"][-1, -1]) == 0


def test_two_processes_that_need_the_same_features_compute_them_once(images: Path, tmp_path: Path) -> None:
    for number in range(30):
        Image.new("RGB", (64, 64), (8 * number, 0, 0)).save(images / f"{number}.png")
    code = """
import sys
from pathlib import Path
from basalt.data.readers import ImageSource
from basalt.train.features import cached_features
from tests.train.conftest import TOWER
images, cache = map(Path, sys.argv[1:])
names = [path.name for path in images.iterdir()]
told = []
features = cached_features(TOWER, ImageSource(images), names, cache, tell=told.append)
print(told[-1] if told else 0, float(sum(features[name].float().sum() for name in sorted(names))))
"""
    command = [sys.executable, "-c", code, str(images), str(tmp_path / "cache")]
    two = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    (seen, one), (others, other) = sorted(
        (process.communicate(timeout=100)[0].split() for process in two), reverse=True
    )
    assert (seen, others) == ("32", "0")
    assert one == other


def test_who_waits_for_features_can_be_stopped(images: Path, tmp_path: Path) -> None:
    cached_features(TOWER, ImageSource(images), ["red.png"], tmp_path / "cache")
    (directory,) = (tmp_path / "cache").iterdir()
    (directory / INDEX).unlink()
    with (directory / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Stopped, match="another process is at work"):
            cached_features(TOWER, ImageSource(images), ["red.png"], tmp_path / "cache", stop=lambda: True)


def test_features_that_were_begun_are_kept_though_the_disk_is_fuller_now(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_features(TOWER, ImageSource(images), ["red.png"], tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    assert worth_keeping(TOWER, ImageSource(images), ["red.png"], tmp_path, torch.float32, uses=3)
