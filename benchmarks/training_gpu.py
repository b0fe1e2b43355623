"""Both stages at their true size on one GPU: Llama-3-8B and SigLIP-SO400M with random weights, bfloat16.

    python benchmarks/training_gpu.py [--rows N] [--recompute] [--quick]

Rows are as LLaVA-1.5's data has them: stage 1 one picture and a caption of some 20 tokens, stage 2 one picture and some
ten short turns, packed. The tower is run for every picture, nothing is cached. Told are tokens a second, the model's
arithmetic over the GPU's (MFU: the tower, padding and what is recomputed do not count) and the peak of memory. Goals on
one card of 80 GB: at least 0.40 in stage 1 and 0.45 in stage 2. `--quick` takes two layers of each part and an eighth
of the LM's width, and runs without a GPU too. The last line is one line of JSON.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sizing import LAYERS, LLAMA, SO400M
from transformers import AutoModelForCausalLM, LlamaConfig, SiglipVisionConfig, SiglipVisionModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from basalt.assistants import TowerSpec
from basalt.data.grouping import Group, fill_rows, group_samples
from basalt.data.packing import Packed, pack
from basalt.data.preprocess import IGNORE, Sample
from basalt.model.precision import dtype_of
from basalt.model.projector import Projector
from basalt.model.vision_encoder import VisionEncoder, transformer_encoder
from basalt.train import parallel
from basalt.train.flops import FlopCounter, peak
from basalt.train.loop import assemble, compile_layers, made_ready
from basalt.train.recipe import DataSource, LoRA, Recipe

GOALS = {"stage1": 0.40, "stage2": 0.45}
IMAGE_TOKEN = 128_002
LM = LlamaConfig(
    **LLAMA,
    num_hidden_layers=LAYERS,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    max_position_embeddings=8192,
)
TOWER = SiglipVisionConfig(**SO400M)
SPEC = TowerSpec(kind="siglip", id="random", image_size=384, tokens=729, width=1152, fit="pad")
QUICK_LAYERS = 2
ROW_LENGTH = {"stage1": 3072, "stage2": 4096}  # four pictures, and three conversations
WARM, TIMED = 3, 8  # steps


def conversation(stage: str, rng: random.Random) -> Sample:
    """A picture, and a caption or some ten turns; a template's tokens around each."""
    if stage == "stage1":
        turns = [(0, rng.randint(8, 32))]
    else:
        turns = [(rng.randint(8, 24), rng.randint(2, 60)) for _ in range(10)]
    ids, labels = [IMAGE_TOKEN] * SPEC.tokens, [IGNORE] * SPEC.tokens
    for question, answer in turns:
        said = [rng.randrange(1000, 100_000) for _ in range(question + answer)]
        ids += said
        labels += [IGNORE] * question + said[question:]
    return Sample(ids, labels)


def passes_of(stage: str, rows_per_pass: int, count: int) -> list[Packed]:
    rng = random.Random(0)
    length = ROW_LENGTH[stage]
    rows: list[list[Group]] = []
    number = 0
    while len(rows) < rows_per_pass * count:
        samples = (((f"{number + n}",), conversation(stage, rng)) for n in range(64))
        rows += fill_rows(group_samples(samples, length, IMAGE_TOKEN), length, rng)
        number += 64
    return [pack(rows[at : at + rows_per_pass], length, 0) for at in range(0, rows_per_pass * count, rows_per_pass)]


def recipe_of(stage: str, rows: int, *, recompute: bool) -> Recipe:
    return Recipe(
        tower=SPEC,
        base_lm=Path("random"),
        image_token_id=IMAGE_TOKEN,
        projector_hidden=LM.hidden_size,
        data=[DataSource(rows=Path("random"))],
        lora=LoRA(rank=16, alpha=32) if stage == "stage2" else None,
        projector_learning_rate=2e-5,
        steps=WARM + TIMED,
        rows_per_pass=rows,
        row_length=ROW_LENGTH[stage],
        recompute=recompute,
    )


def measure(stage: str, rows: int, *, recompute: bool) -> dict[str, float]:
    """Tokens a second, MFU and peak memory of one stage."""
    recipe, device = recipe_of(stage, rows, recompute=recompute), parallel.device()
    dtype = dtype_of(recipe.dtype, device)
    torch.manual_seed(0)
    with device:
        base: Any = AutoModelForCausalLM.from_config(LM, dtype=dtype)
        tower: VisionEncoder = transformer_encoder(SPEC, SiglipVisionModel(TOWER)).to(device, dtype)
        projector = Projector(SPEC.width, recipe.projector_hidden, LM.hidden_size).to(device, dtype)
    model, optimizer = assemble(projector, made_ready(base, recipe, device), recipe)
    compile_layers(model.causal_lm.model.layers)
    batches = passes_of(stage, rows, WARM + TIMED)
    flops, began = FlopCounter(model), 0.0
    pixels = torch.randn(max(len(batch.images) for batch in batches), 3, SPEC.image_size, SPEC.image_size)
    pixels = pixels.to(device, dtype)
    for number, batch in enumerate(batches):
        if number == WARM:
            _wait_for(device)
            began = time.perf_counter()
        with torch.no_grad():
            features = tower(pixels[: len(batch.images)])
        loss = model.packed_loss(batch.to(device), features)
        (loss / len(batch.target)).backward()
        optimizer.step(1.0, recipe.clip)
    _wait_for(device)
    seconds = time.perf_counter() - began
    timed = batches[WARM:]
    tokens = sum(int((batch.groups >= 0).sum()) for batch in timed)
    rate = peak(device, dtype)
    found = {
        "tokens_per_s": round(tokens / seconds, 1),
        "padding": round(1 - tokens / sum(batch.ids.numel() for batch in timed), 4),
        "seconds_per_step": round(seconds / TIMED, 4),
    }
    if rate is not None:
        found["mfu"] = round(sum(map(flops.of, timed)) / seconds / rate, 4)
    if device.type == "cuda":
        found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(
    rows: Annotated[int, typer.Option(help="packed rows in a step: what fits memory")] = 2,
    recompute: Annotated[bool, typer.Option("--recompute", help="activation checkpointing")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="two layers of each part, the LM an eighth as wide")] = False,
) -> None:
    if parallel.device().type != "cuda" and not quick:
        sys.exit("this needs a GPU of 80 GB; --quick tries the command without one, on small shapes")
    if quick:
        LM.num_hidden_layers = TOWER.num_hidden_layers = QUICK_LAYERS
        LM.hidden_size, LM.intermediate_size, LM.num_attention_heads, LM.num_key_value_heads = 512, 1792, 4, 1
    told: dict[str, Any] = {"rows": rows, "recompute": recompute, "layers": LM.num_hidden_layers}
    for stage in GOALS:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            told[stage] = measure(stage, rows, recompute=recompute)
        except torch.OutOfMemoryError:
            sys.exit(f"{stage} with {rows} rows does not fit: try --rows {max(rows // 2, 1)} or --recompute")
        print(stage, told[stage], flush=True)
    told["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    reached = {stage: told[stage].get("mfu", 0) >= goal for stage, goal in GOALS.items()}
    print(json.dumps({"benchmark": "training_gpu", **told} | ({} if quick else {"reached": reached})))


if __name__ == "__main__":
    typer.run(main)
