"""From a finished run to an assistant the services load: its files, and the manifest that names them by digest."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from basalt.assistants import (
    ADAPTER,
    ADAPTER_CONFIG,
    Assistant,
    BaseLMSpec,
    LoRASpec,
    Manifest,
    ProjectorSpec,
    load_assistant,
    replacing,
    seal,
    sha256,
)
from basalt.catalog import reference
from basalt.data.preprocess import TEMPLATES
from basalt.model.projector import Projector
from basalt.train.checkpoints import learned
from basalt.train.digests import rows_digest, tower_digest, weights_digest
from basalt.train.progress import read_log
from basalt.train.recipe import Recipe
from basalt.train.start import Start, read_start

MEASURED = ("step", "loss", "held_out_loss")  # of a run's log
VERSION = "version"  # file in a run's directory: NAME@HEX of what was last published from it


def publish(run: Path, name: str, models: Path, lineage: dict[str, Any]) -> Assistant:
    """Writes `models/name`, in the place of what was there, from the run directory of stage 1 or stage 2.

    The features' standardisation is folded into the projector, so that what is served is the plain 2-layer MLP.

    Args:
        lineage: what is told beside the run's own: recipe, data and frozen parts by digest, figures, parent.

    Raises:
        FileNotFoundError: the run is not finished.
        AssistantError: the projector does not fit the base LM, or `models/name` is there and no assistant.
    """
    state = learned(run)
    recipe = _recipe(run)
    if state["step"] < state["steps"] or (recipe.lora is not None and not (run / "lora").is_dir()):
        raise FileNotFoundError(f"{run} is not finished: start it again, it goes on where it stopped")

    config = AutoConfig.from_pretrained(recipe.base_lm)
    base_lm = BaseLMSpec(
        id=recipe.base_lm.name if recipe.base_lm.is_dir() else str(recipe.base_lm),
        lm_dim=config.hidden_size,
        context=config.max_position_embeddings,
        image_token_id=recipe.image_token_id,
    )
    projector = Projector(recipe.tower.width, recipe.projector_hidden, base_lm.lm_dim)
    projector.take(state["projector"], str(run))
    folded = projector.folded(state["standardizer"]["mean"], state["standardizer"]["std"])
    start = read_start(recipe, base_lm.lm_dim) if recipe.keep_start else None
    if start is not None:
        folded.load_state_dict(_mean(folded.state_dict(), start.projector.state_dict(), recipe.keep_start))

    with replacing(models / name) as directory:
        folded.to(torch.float16).save(str(directory / "projector.safetensors"))
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
            lora=_adapter(run, directory / "lora", recipe, start),
            chat_template="chat_template.jinja",
            lineage={
                "run": _record(run),
                "parent": state.get("parent") or _parent(recipe),
                "base_lm": weights_digest(recipe.base_lm),
                "tower": tower_digest(recipe.tower),
            }
            | lineage,
        )
        seal(directory, manifest)
    assistant = load_assistant(models / name)
    (run / VERSION).write_text(f"{reference(assistant)}\n")
    return assistant


def _recipe(run: Path) -> Recipe:
    return Recipe.model_validate_json((run / "recipe.json").read_text())


def _mean(learned: dict[str, Tensor], start: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Of both weights by name, float32; `share` of it is the start's."""
    return {name: torch.lerp(value.float(), start[name].float(), share) for name, value in learned.items()}


def _adapter(run: Path, directory: Path, recipe: Recipe, start: Start | None) -> LoRASpec | None:
    """The run's LoRA in bf16, its mean with the one of `start` where there is that; None where none was trained."""
    if recipe.lora is None:
        return None
    directory.mkdir()
    shutil.copy(run / "lora" / ADAPTER_CONFIG, directory)
    weights = load_file(run / "lora" / ADAPTER)
    if start is not None and start.adapter is not None:
        weights = _mean(weights, load_file(start.adapter / ADAPTER), recipe.keep_start)
    save_file({key: value.to(torch.bfloat16) for key, value in weights.items()}, directory / ADAPTER)
    return LoRASpec(dir=directory.name, digest=sha256((directory / ADAPTER).read_bytes()), rank=recipe.lora.rank)


def _record(run: Path) -> dict[str, Any] | None:
    """What a run was: its recipe, its rows by digest, its last losses, and the same of the run it started from."""
    if not (run / "recipe.json").is_file():  # of a stage that another machine trained, only the checkpoint comes along
        return None
    recipe = _recipe(run)
    last = read_log(run)[-1:]
    return {
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "data": {str(source.rows): rows_digest(source.rows) for source in recipe.data},
        "measured": {name: line[name] for line in last for name in MEASURED if name in line},
        "start": None if recipe.start is None else _record(recipe.start),
    }


def _parent(recipe: Recipe) -> str | None:
    """NAME@HEX of what was published from the run this one started from."""
    marked = None if recipe.start is None else recipe.start / VERSION
    return marked.read_text().strip() if marked is not None and marked.is_file() else None
