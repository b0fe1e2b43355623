"""The LoRA of stage 2: on all linear layers of the base LM, fresh or an assistant's that is trained on."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from basalt.assistants import ADAPTER
from basalt.train.recipe import LoRA, RecipeError

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of peft's configuration: what decides which function an adapter's weights are.
MEANING = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def config_of(lora: LoRA) -> LoraConfig:
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=LINEARS, task_type="CAUSAL_LM")


def check_adapter(adapter: Path, lora: LoRA) -> None:
    """Sees that an adapter, a directory as peft writes it, can be trained on.

    Raises:
        RecipeError: it is not of the recipe's rank, alpha and layers.
    """
    theirs, ours = LoraConfig.from_pretrained(str(adapter)), config_of(lora)
    pairs = {name: (_plain(getattr(theirs, name)), _plain(getattr(ours, name))) for name in MEANING}
    told = [
        f"{name} is {there} there and {here} in the recipe" for name, (there, here) in pairs.items() if there != here
    ]
    if told:
        raise RecipeError(f"the LoRA of {adapter} cannot be trained on: {'; '.join(told)}")


def add_lora(lm: Any, lora: LoRA, adapter: Path | None) -> Any:
    """The base LM with a LoRA to be trained.

    Args:
        adapter: whose weights it begins with; None for a fresh one, which changes nothing yet.

    Raises:
        RecipeError: the adapter is of an LM with other layers.
    """
    lm = get_peft_model(lm, config_of(lora), autocast_adapter_dtype=False)
    if adapter is None:
        return lm
    wanted = {name.replace(".default", ""): value.shape for name, value in lm.named_parameters() if "lora_" in name}
    weights = load_file(adapter / ADAPTER)
    if wanted != {name: value.shape for name, value in weights.items()}:
        raise RecipeError(f"{adapter / ADAPTER} is a LoRA for an LM with other layers than the recipe's base_lm")
    set_peft_model_state_dict(lm, weights)
    return lm


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list) else value
