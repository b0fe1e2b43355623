"""What docs/operations.md says a GPU holds, allocated: Llama-3-8B, SigLIP-SO400M, projector, LoRA, key-value cache.

`python benchmarks/sizing.py [--quick]` makes each part with random weights in bfloat16, on the GPU where there is one,
else in main memory (20 GiB of it), and ends with one line of JSON: what the arithmetic says and what was taken, in GiB.
`--quick` takes a quarter of the LM's layers.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from basalt.model.projector import Projector

GIB = 2**30
CACHED_TOKENS = 8192
RANK = 64
IMAGES = 4  # of one forward of the tower
LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 32, 4096, 14336, 32, 8, 128_256
LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
}
SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def arithmetic(layers: int) -> dict[str, int]:
    """Bytes, from the models' papers' shapes alone, two a parameter."""
    keys_values = HIDDEN // HEADS * KV_HEADS
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * keys_values
    layer = attention + 3 * HIDDEN * FEED_FORWARD + 2 * HIDDEN
    tower_layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    tower = 27 * tower_layer + (3 * 14 * 14 * 1152 + 1152) + 27 * 27 * 1152 + 2 * 1152
    shapes = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, keys_values)] * 2 + [(HIDDEN, FEED_FORWARD)] * 3
    return {
        "llm": 2 * (layers * layer + 2 * VOCABULARY * HIDDEN + HIDDEN),
        "tower": 2 * tower,
        "projector": 2 * (1152 * HIDDEN + HIDDEN + HIDDEN * HIDDEN + HIDDEN),
        "lora": 2 * layers * RANK * sum(inside + outside for inside, outside in shapes),
        "cache": 2 * layers * keys_values * 2 * CACHED_TOKENS,
    }


def main(quick: Annotated[bool, typer.Option("--quick", help="a quarter of the LM's layers")] = False) -> None:
    layers = LAYERS // 4 if quick else LAYERS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held: list[Any] = []  # everything stays, as it does in a service

    def make(build: Callable[[], nn.Module]) -> nn.Module:
        """Random weights: memory that was never written to would not count."""
        with torch.device("meta"):
            module = build().to(torch.bfloat16).requires_grad_(False)
        module.to_empty(device=device)
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(0.01)
        held.append(module)
        return module

    def cache() -> None:
        shape = (layers, 2, CACHED_TOKENS, KV_HEADS, HIDDEN // HEADS)
        held.append(torch.full(shape, 0.01, dtype=torch.bfloat16, device=device))

    def lora() -> None:
        """Beside the LM, which holds it no second time."""
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapted = get_peft_model(held[0], LoraConfig(r=RANK, target_modules=names), autocast_adapter_dtype=False)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.full_like(parameter, 0.01, dtype=torch.bfloat16, device=device)

    expected = arithmetic(layers)
    torch.ones(8, device=device).sum().item()  # what a context of its own takes comes before
    result: dict[str, Any] = {"device": str(device), "layers": layers}
    steps: dict[str, Callable[[], Any]] = {
        "llm": lambda: make(lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **LLAMA))),
        "tower": lambda: make(lambda: SiglipVisionModel(SiglipVisionConfig(**SO400M))),
        "projector": lambda: make(lambda: Projector(1152, HIDDEN, HIDDEN)),
        "lora": lora,
        "cache": cache,
    }
    for name, step in steps.items():
        before = taken(device)
        step()
        result[name] = {
            "arithmetic_gib": round(expected[name] / GIB, 3),
            "taken_gib": round((taken(device) - before) / GIB, 3),
        }
    result["tower_forward_gib"] = round(peak_of_forward(held[1], device) / GIB, 3)
    sums = {key: sum(result[name][key] for name in steps) for key in ("arithmetic_gib", "taken_gib")}
    print(json.dumps({"benchmark": "sizing", **result, "ratio": round(sums["taken_gib"] / sums["arithmetic_gib"], 3)}))


def taken(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process(os.getpid()).memory_info().rss


@torch.inference_mode()
def peak_of_forward(tower: nn.Module, device: torch.device) -> int:
    """What the tower takes beside its weights for a batch of images."""
    pixels = torch.full((IMAGES, 3, 384, 384), 0.01, dtype=torch.bfloat16, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = taken(device)
        tower(pixels)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = taken(device)
    tower(pixels)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before


if __name__ == "__main__":
    typer.run(main)
