"""Two processes on this machine's CPU that train what one would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from basalt.train.progress import read_log
from basalt.train.recipe import DataSource, Recipe
from basalt.train.stage1_align import train_stage1
from basalt.train.stage2_instruct import train_stage2
from tests.stack.conftest import ROOT, free_ports
from tests.train.runs import masters


def launched(processes: int, *what: str, seconds: float = 200) -> subprocess.CompletedProcess[str]:
    """What `torchrun` makes of it."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port"]
    command = [sys.executable, *launch, str(free_ports(1)[0]), *what]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)


def trained(processes: int, stage: str, recipe: Recipe, directory: Path) -> subprocess.CompletedProcess[str]:
    config = directory.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return launched(processes, "-m", "basalt.cli", "train", stage, str(config), "--out", str(directory))


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
    done = trained(2, "stage2", recipe.model_copy(update={"shard": shard}), tmp_path / "together")
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(read_log(tmp_path / "alone"), read_log(tmp_path / "together"), strict=True):
        assert two["tokens"] == one["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-3)
    alone, together = masters(tmp_path / "alone"), masters(tmp_path / "together")
    assert alone.keys() == together.keys()


def test_passes_that_cannot_be_shared_are_refused(stage2: Recipe, aligned: Path, tmp_path: Path) -> None:
    recipe = stage2.model_copy(update={"start": aligned, "passes_per_step": 1})
    done = trained(4, "stage2", recipe, tmp_path / "run")
    assert "passes_per_step = 1 cannot be shared by 4 processes alike" in done.stderr
    assert "Invalid JSON" not in done.stderr  # one writes the recipe, the others read it whole


@pytest.mark.slow
def test_passes_without_images_and_parts_of_passes_keep_sharded_processes_together(
    stage1: Recipe, tmp_path: Path
) -> None:
    """Stage 1 has nothing to learn from rows of text, with which a picture finds no room here; five rows are two
    passes of two and one of one, in which there are fewer parts than in the others."""
    turn = [{"from": "human", "value": "Really?"}, {"from": "gpt", "value": "Yes."}]
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"conversations": turn * 11}] * 3))
    update = {
        "data": [*stage1.data, DataSource(rows=chat)],
        "dtype": "float32",
        "steps": 6,
        "row_length": 400,
        "passes_per_step": 4,
    }
    recipe = stage1.model_copy(update=update)
    train_stage1(recipe, tmp_path / "alone")
    sharded = recipe.model_copy(update={"shard": True, "split": 2})
    done = trained(2, "stage1", sharded, tmp_path / "together")
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(read_log(tmp_path / "alone"), read_log(tmp_path / "together"), strict=True):
        assert two["tokens"] == one["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-4)


CUT_UP = """
import sys
import torch
from pathlib import Path
from torch.distributed.tensor import DTensor
from basalt.data.grouping import Group
from basalt.data.packing import pack
from basalt.data.preprocess import IGNORE, Sample
from basalt.model.projector import Projector
from basalt.train import parallel
from basalt.train.loop import assemble, load_base_lm
from basalt.train.recipe import Recipe

recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
with parallel.together():
    lm = load_base_lm(recipe, parallel.device())
    frozen = [parameter.numel() for parameter in lm.model.layers.parameters()]
    held = [parameter.to_local().numel() for parameter in lm.model.layers.parameters()]
    assert sum(held) == sum(frozen) / 2, (sum(held), sum(frozen))
    model, _ = assemble(Projector(recipe.tower.width, 48, lm.config.hidden_size), lm, recipe)
    layers = model.causal_lm.model.layers
    cut = []
    layers[1].register_forward_pre_hook(lambda *_: cut.append(isinstance(first(), DTensor)))

    def first():
        return layers[0].self_attn.q_proj.base_layer.weight

    batch = pack([[Group((), [], [Sample([20, 21, 22], [IGNORE, 21, 22])])]], 32, 0)
    model.packed_loss(batch, None).backward()
    assert cut == [True], cut  # forward, when the next layer begins
    assert isinstance(first(), DTensor)  # and after backward
"""


@pytest.mark.slow
def test_a_sharded_lm_is_nowhere_whole(stage2: Recipe, tmp_path: Path) -> None:
    recipe, script = tmp_path / "recipe.json", tmp_path / "cut_up.py"
    recipe.write_text(stage2.model_copy(update={"shard": True}).model_dump_json())
    script.write_text(CUT_UP)
    done = launched(2, str(script), str(recipe))
    assert done.returncode == 0, done.stderr[-3000:]


DECIDED = """
import shutil, sys
from pathlib import Path
from types import SimpleNamespace
from transformers import AutoTokenizer
from basalt.data.preprocess import TEMPLATES, Tokenizer
from basalt.train import parallel
from basalt.train.data import prepare
from basalt.train.recipe import Recipe

recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
free = [int(free) for free in sys.argv[2].split(",")]
with parallel.together():
    rank, _ = parallel.rank_and_world()
    shutil.disk_usage = lambda _: SimpleNamespace(free=free[rank])
    template = (TEMPLATES / recipe.chat_template).read_text()
    lm = AutoTokenizer.from_pretrained(recipe.base_lm)
    sources = prepare(recipe.data, recipe, Tokenizer(lm, template, recipe.image_token_id, recipe.tower.tokens))
    sys.stderr.write(f"{rank}: {type(sources[0].features).__name__}\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("free", "kind"), [("10000000000,10", "FeatureCache"), ("10,10000000000", "LiveFeatures")])
def test_processes_keep_features_all_or_none(free: str, kind: str, stage1: Recipe, tmp_path: Path) -> None:
    """Though their disks differ: the first's decides."""
    recipe, script = tmp_path / "recipe.json", tmp_path / "decided.py"
    recipe.write_text(stage1.model_copy(update={"features": tmp_path / "features"}).model_dump_json())
    script.write_text(DECIDED)
    done = launched(2, str(script), str(recipe), free)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {f"{rank}: {kind}" for rank in range(2)} <= set(done.stderr.splitlines())
