import hashlib
import json
import platform
from pathlib import Path

import torch

from basalt.train.environment import ENVIRONMENT, keep_environment
from basalt.train.recipe import Recipe


def test_a_run_tells_its_data_and_its_environment(stage1: Recipe, aligned: Path) -> None:
    """`aligned` is a finished run of `stage1`."""
    told = json.loads((aligned / ENVIRONMENT).read_text().splitlines()[0])
    rows = stage1.data[0].rows
    assert told["data"] == {str(rows): f"sha256:{hashlib.sha256(rows.read_bytes()).hexdigest()}"}
    weights = (stage1.base_lm / "model.safetensors").read_bytes()
    assert told["base_lm"] == f"sha256:{hashlib.sha256(weights).hexdigest()}"
    assert told["packages"]["torch"] == torch.__version__
    assert told["python"] == platform.python_version()


def test_every_start_is_a_line(stage1: Recipe, tmp_path: Path) -> None:
    for _ in range(2):
        keep_environment(stage1, tmp_path)
    assert len((tmp_path / ENVIRONMENT).read_text().splitlines()) == 2
