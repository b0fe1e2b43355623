"""A full disk: what a run tells of it, and what it leaves behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from basalt.train import checkpoints
from basalt.train.job import NO_ROOM
from basalt.train.plan import PLAN, REFUSAL, Plan, Refusal, Stage
from basalt.train.recipe import Recipe


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with half a MiB, too little for one checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_as_such_and_the_last_checkpoint_stays(small_disk: Path) -> None:
    kept = checkpoints.save(small_disk, 1, {"weights": torch.ones(1000)})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(small_disk, 2, {"weights": torch.ones(10**6)})
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == [kept.path.name]
    state = checkpoints.load_last(small_disk)
    assert state is not None
    assert len(state["weights"]) == 1000


def test_a_job_without_room_says_so_in_its_refusal(small_disk: Path, stage1: Recipe) -> None:
    plan = Plan(name="pictures", stages=[Stage(name="stage1", recipe=stage1)], lineage={})
    (small_disk / PLAN).write_text(plan.model_dump_json())
    done = subprocess.run([sys.executable, "-m", "basalt.train.job", str(small_disk)], check=False)
    assert done.returncode == NO_ROOM
    assert Refusal.model_validate_json((small_disk / REFUSAL).read_text()).code == "disk_full"
