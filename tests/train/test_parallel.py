"""Two processes on this machine's CPU that train what one would."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from basalt.train.progress import read_log
from basalt.train.recipe import Recipe
from basalt.train.stage2_instruct import train_stage2
from tests.stack.conftest import ROOT, free_ports
from tests.train.runs import masters


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_two_processes_train_as_one(
    shard: bool,
    stage2: Recipe,
    aligned: Path,
    tmp_path: Path,
) -> None:
    recipe = stage2.model_copy(update={"start": aligned, "steps": 6, "passes_per_step": 4})
    train_stage2(recipe, tmp_path / "alone")
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe.model_dump(mode="json") | {"shard": shard}))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_ports(1)[0])]
    command = [*launch, "-m", "basalt.cli", "train", "stage2", str(config), "--out", str(tmp_path / "together")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(read_log(tmp_path / "alone"), read_log(tmp_path / "together"), strict=True):
        assert two["tokens"] == one["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-3)
    alone, together = masters(tmp_path / "alone"), masters(tmp_path / "together")
    assert alone.keys() == together.keys()


def test_passes_that_cannot_be_shared_are_refused(stage2: Recipe, aligned: Path, tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(
        yaml.safe_dump(stage2.model_copy(update={"start": aligned, "passes_per_step": 1}).model_dump(mode="json"))
    )
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "4", "--master-port", str(free_ports(1)[0])]
    command = [*launch, "-m", "basalt.cli", "train", "stage2", str(config), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert "passes_per_step = 1 cannot be shared by 4 processes alike" in done.stderr
    assert "Invalid JSON" not in done.stderr  # one writes the recipe, the others read it whole
