"""Stage 2, instruction tuning: projector and a LoRA on all linear layers of the base LM, on conversations.

LLaVA-1.5's LoRA recipe (Liu et al. 2023) with own learning rates for projector and LoRA; the output head
and the tower stay as they are.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from basalt.model.multimodal_llama import MultimodalLlama
from basalt.train import parallel
from basalt.train.loop import Run, trainable
from basalt.train.optimizer import MasterAdamW
from basalt.train.phase import never
from basalt.train.recipe import Recipe, RecipeError

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train_stage2(recipe: Recipe, directory: Path, stop: Callable[[], bool] = never) -> None:
    """Trains projector and LoRA, leaves them in the run's last checkpoint and the adapter in `directory/lora`.

    Raises:
        Stopped: `stop` said so.
    """
    if recipe.lora is None or recipe.start is None:
        raise RecipeError("stage 2 needs `lora` and the run of stage 1 as `start`")
    if recipe.grounding is not None:
        raise RecipeError("`grounding` belongs to stage 1")
    run = Run(recipe, directory)
    config = LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules=LINEARS, task_type="CAUSAL_LM")
    torch.manual_seed(recipe.seed)  # the same LoRA in every process
    lm = get_peft_model(run.lm, config, autocast_adapter_dtype=False)
    model = MultimodalLlama(None, run.projector, lm, recipe.image_token_id)
    optimizer = MasterAdamW(
        [(trainable(run.projector), recipe.projector_learning_rate), (trainable(lm), recipe.lora.learning_rate)],
        recipe.weight_decay,
    )
    run.train("stage 2", model, optimizer, stop)
    if parallel.rank_and_world()[0] == 0:
        lm.save_pretrained(str(directory / "lora"))
