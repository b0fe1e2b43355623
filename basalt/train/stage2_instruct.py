"""Stage 2, instruction tuning: projector and a LoRA on all linear layers of the base LM, on conversations.

LLaVA-1.5's LoRA recipe (Liu et al. 2023) with own learning rates for projector and LoRA; the output head
and the tower stay as they are.
"""

from pathlib import Path

from peft import LoraConfig, get_peft_model

from basalt.model.multimodal_llama import MultimodalLlama
from basalt.train.loop import MasterAdamW, Run, named
from basalt.train.recipe import Recipe, RecipeError

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train_stage2(recipe: Recipe, directory: Path) -> None:
    """Trains projector and LoRA, leaves them in `directory/checkpoint.pt` and the adapter in `directory/lora`."""
    if recipe.lora is None or recipe.start is None:
        raise RecipeError("stage 2 needs `lora` and the run of stage 1 as `start`")
    run = Run(recipe, directory)
    config = LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules=LINEARS, task_type="CAUSAL_LM")
    lm = get_peft_model(run.lm, config, autocast_adapter_dtype=False)
    model = MultimodalLlama(None, run.projector, lm, recipe.image_token_id)
    adapter, projector = named(lm.named_parameters()), named(run.projector.named_parameters())
    optimizer = MasterAdamW(
        [(projector, recipe.projector_learning_rate), (adapter, recipe.lora.learning_rate)], recipe.weight_decay
    )
    run.train(model, optimizer)
    lm.save_pretrained(str(directory / "lora"))
