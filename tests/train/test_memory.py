"""A long run holds no more memory at its end than after its first steps."""

from pathlib import Path

import psutil
import pytest

from basalt.train.recipe import Recipe
from basalt.train.stage1_align import train_stage1


@pytest.mark.slow
def test_memory_does_not_grow_over_500_steps(stage1: Recipe, tmp_path: Path) -> None:
    resident: list[float] = []

    def watch() -> bool:
        resident.append(psutil.Process().memory_info().rss / 2**20)
        return False

    train_stage1(
        stage1.model_copy(update={"steps": 500, "passes_per_step": 1, "held_out": None, "checkpoint_every": 100}),
        tmp_path / "run",
        watch,
    )
    # MiB; before the 100th step it compiles and writes its first checkpoint.
    settled, late = max(resident[100:200]), max(resident[400:])
    assert late < settled + 30, [round(megabytes) for megabytes in resident[::50]]
