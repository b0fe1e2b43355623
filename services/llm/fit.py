"""Which assistants a base LM can serve. No vLLM: what does not fit is said at once when the service starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors import safe_open

from basalt.assistants import Assistant

ARCHITECTURES = {"LlamaForCausalLM": "BasaltLlamaForCausalLM", "Qwen2ForCausalLM": "BasaltQwen2ForCausalLM"}
# Never the embedding layer: vLLM would wrap it, and image positions have no token to look up there.
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for


class Misfit(Exception):
    """What is missing or does not fit, in one line."""


@dataclass(frozen=True)
class BaseLM:
    """The base LM's directory and what its config says."""

    directory: Path
    architecture: str
    lm_dim: int
    context: int

    @classmethod
    def read(cls, directory: Path) -> Self:
        missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
        if not missing and not any(directory.glob("*.safetensors")):
            missing = ["*.safetensors"]
        if missing:
            raise Misfit(
                f"the base LM is not ready: {directory} has no {missing[0]}; "
                "run `basalt models prepare` or set BASALT_BASE_LM_DIR to a Hugging Face model directory"
            )
        config = json.loads((directory / "config.json").read_text())
        architecture = config.get("architectures", [None])[0]
        if architecture not in ARCHITECTURES:
            raise Misfit(
                f"the base LM in {directory} is a {architecture}; this service takes {' or '.join(ARCHITECTURES)}"
            )
        return cls(directory, architecture, config["hidden_size"], config["max_position_embeddings"])


def check_weights(lora: Path, name: str) -> None:
    """Raises Misfit: the LoRA directory has a part for a layer that gets none here, or a weight that is not finite. In
    a batch that one would spoil others' answers too."""
    with safe_open(lora / "adapter_model.safetensors", framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118  (it is no dict)
            if not any(f".{module}." in key for module in LORA_MODULES):
                raise Misfit(f"{name}: its LoRA has {key}; served are those of {', '.join(LORA_MODULES)}")
            if not weights.get_tensor(key).isfinite().all():
                raise Misfit(f"{name}: its LoRA's {key} has values that are not finite: it was trained badly")


def check_fit(assistant: Assistant, base_lm: BaseLM, max_lora_rank: int = LORA_RANKS[-1]) -> None:
    """Raises:
    Misfit: the assistant is made for another LM, or its LoRA is of too high a rank.
    """
    spec = assistant.manifest.base_lm
    if spec.lm_dim != base_lm.lm_dim:
        raise Misfit(
            f"{assistant.name} is made for {spec.id} of width {spec.lm_dim}, "
            f"the base LM in {base_lm.directory} has width {base_lm.lm_dim}"
        )
    if not assistant.path(assistant.manifest.chat_template).is_file():
        raise Misfit(f"{assistant.name}: {assistant.path(assistant.manifest.chat_template)} is missing")
    if assistant.manifest.lora and assistant.manifest.lora.rank > max_lora_rank:
        raise Misfit(
            f"{assistant.name}: its LoRA has rank {assistant.manifest.lora.rank}, served are ranks up to "
            f"{max_lora_rank}: set BASALT_LLM_MAX_LORA_RANK"
        )
