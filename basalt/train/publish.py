"""From a finished run to an assistant the services load: its files, and the manifest that names them by digest."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from basalt.assistants import (
    MANIFEST,
    Assistant,
    BaseLMSpec,
    LoRASpec,
    Manifest,
    ProjectorSpec,
    load_assistant,
    sha256,
)
from basalt.data.preprocess import TEMPLATES
from basalt.model.projector import Projector
from basalt.train.loop import learned
from basalt.train.recipe import Recipe

ADAPTER = "adapter_model.safetensors"


def publish(run: Path, name: str, models: Path, lineage: dict[str, Any]) -> Assistant:
    """Writes `models/name` from the run directory of stage 1 or stage 2.

    The features' standardisation is folded into the projector, so that what is served is the plain 2-layer MLP.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    state = learned(run)
    recipe = Recipe.model_validate_json((run / "recipe.json").read_text())
    if state["step"] < state["steps"] or (recipe.lora is not None and not (run / "lora").is_dir()):
        raise FileNotFoundError(f"{run} is not finished: start it again, it goes on where it stopped")
    directory = models / name
    directory.mkdir(parents=True, exist_ok=True)

    config = json.loads((recipe.base_lm / "config.json").read_text())
    base_lm = BaseLMSpec(
        id=recipe.base_lm.name,
        lm_dim=config["hidden_size"],
        context=config["max_position_embeddings"],
        image_token_id=recipe.image_token_id,
    )
    projector = Projector(recipe.tower.width, recipe.projector_hidden, base_lm.lm_dim)
    projector.load_state_dict(state["projector"])
    folded = projector.folded(state["standardizer"]["mean"], state["standardizer"]["std"])
    folded.to(torch.float16).save(str(directory / "projector.safetensors"))

    lora = None
    if recipe.lora is not None:
        adapter = directory / "lora"
        shutil.rmtree(adapter, ignore_errors=True)
        adapter.mkdir()
        shutil.copy(run / "lora" / "adapter_config.json", adapter)
        weights = load_file(run / "lora" / ADAPTER)
        save_file({key: value.to(torch.bfloat16) for key, value in weights.items()}, adapter / ADAPTER)
        lora = LoRASpec(dir="lora", digest=sha256((adapter / ADAPTER).read_bytes()), rank=recipe.lora.rank)

    shutil.copy(TEMPLATES / recipe.chat_template, directory / "chat_template.jinja")
    manifest = Manifest(
        name=name,
        tower=recipe.tower,
        projector=ProjectorSpec(
            file="projector.safetensors",
            digest=sha256((directory / "projector.safetensors").read_bytes()),
            hidden=recipe.projector_hidden,
        ),
        base_lm=base_lm,
        lora=lora,
        chat_template="chat_template.jinja",
        lineage=lineage,
    )
    for file in directory.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes for its owner alone
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return load_assistant(directory)
