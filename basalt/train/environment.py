"""What a run learned from and ran on, in its directory beside the recipe: a line for every time it was started."""

import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from basalt.train import parallel
from basalt.train.digests import rows_digest, tower_digest, weights_digest
from basalt.train.recipe import Recipe

ENVIRONMENT = "environment.jsonl"
PACKAGES = ("basalt", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pillow")


def keep_environment(recipe: Recipe, directory: Path) -> None:
    with (directory / ENVIRONMENT).open("a") as file:
        file.write(json.dumps(environment(recipe)) + "\n")


def environment(recipe: Recipe) -> dict[str, Any]:
    """Data, frozen parts by digest, packages and device, as they are now."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": {str(source.rows): rows_digest(source.rows) for source in recipe.data},
        "base_lm": weights_digest(recipe.base_lm),
        "tower": tower_digest(recipe.tower),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "device": _device(parallel.device()),
        "processes": parallel.rank_and_world()[1],
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
