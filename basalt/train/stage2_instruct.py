"""Stage 2, instruction tuning: projector and a LoRA on all linear layers of the base LM, on conversations.

LLaVA-1.5's LoRA recipe (Liu et al. 2023) with own learning rates for projector and LoRA; the output head
and the tower stay as they are.
"""

from pathlib import Path

import torch

from basalt.train import parallel
from basalt.train.loop import Run, assemble
from basalt.train.recipe import Recipe, RecipeError
from basalt.train.stop import Stop, never


def train_stage2(recipe: Recipe, directory: Path, stop: Stop = never) -> None:
    """Trains projector and LoRA, leaves them in the run's last checkpoint and the adapter in `directory/lora`.

    Raises:
        Stopped: `stop` said so.
    """
    if recipe.lora is None or recipe.start is None:
        raise RecipeError("stage 2 needs `lora`, and a run of stage 1 or an assistant's directory as `start`")
    if recipe.grounding is not None:
        raise RecipeError("`grounding` belongs to stage 1")
    run = Run(recipe, directory, stop)
    torch.manual_seed(recipe.seed)  # the same LoRA in every process
    adapter = None if run.start is None else run.start.adapter
    model, optimizer = assemble(run.projector, run.lm, recipe, adapter)
    run.train("stage2", model, optimizer, stop)
    if parallel.rank_and_world()[0] == 0:
        model.lm.save_pretrained(str(directory / "lora"))
