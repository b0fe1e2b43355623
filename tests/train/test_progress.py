import gc
from pathlib import Path

import numpy as np
import pytest

from basalt.train import progress
from basalt.train.progress import Looking, memory_held, read_log


def test_images_seen_are_told_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Looking(tmp_path / "features") as look:
        for seen in range(32, 320, 32):  # two a second
            look(seen, 300)
            now += 16
        look(300, 300)
    rates = {"steps": 300, "images_per_second": 2.0}
    lines = read_log(tmp_path / "features")
    assert lines[:-1] == [{"step": step} | rates for step in (96, 160, 224, 288)]
    assert lines[-1]["step"] == 300


def test_of_images_seen_before_no_rate_is_told(tmp_path: Path) -> None:
    with Looking(tmp_path) as look:
        look(300, 300)
    assert read_log(tmp_path) == [{"step": 300, "steps": 300}]


def test_memory_held_is_that_of_numbers_and_not_of_files_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(2**26))
    gc.collect()  # what other tests left is not freed in the middle
    before = memory_held()
    mapped = np.memmap(tmp_path / "zeros", mode="r")
    assert not mapped.any()
    assert memory_held() - before < 2**25
    before = memory_held()
    held = np.ones(2**28, dtype=np.uint8)
    assert memory_held() - before > 0.9 * held.nbytes
