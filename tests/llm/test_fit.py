"""Which LoRAs a base LM can serve."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.llm.fit import Misfit, check_weights


def test_a_lora_of_a_layer_that_gets_none_is_refused(tmp_path: Path) -> None:
    weights = {f"base_model.model.{layer}.lora_A.weight": torch.zeros(1, 1) for layer in ("mlp.up_proj", "lm_head")}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Misfit, match=r"mine: its LoRA has base_model.model.lm_head.lora_A.weight; served are those of"):
        check_weights(tmp_path, "mine")
