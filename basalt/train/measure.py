"""A few real steps of a recipe, timed: the base LM, projector and LoRA at full size, on rows as they would be dealt.

The tower is not run: its features are random numbers of the right shape, which take the LM just as long.
"""

import time

import torch

from basalt.data.check import Measured
from basalt.data.grouping import Pass, pass_length
from basalt.data.packing import pack
from basalt.model.multimodal_llama import MultimodalLlama
from basalt.model.precision import dtype_of
from basalt.model.projector import Projector
from basalt.train import parallel
from basalt.train.loop import COMPILE_FROM, assemble, compile_layers, keep_freed_memory, load_base_lm
from basalt.train.optimizer import MasterAdamW
from basalt.train.progress import memory_held
from basalt.train.recipe import Recipe

WARM, TIMED = 2, 3


def measure_steps(recipe: Recipe, passes: list[Pass]) -> Measured:
    """Trains on the step of middling size among `passes`, twice to warm up and three times timed."""
    keep_freed_memory()
    model, optimizer = _model(recipe)
    chosen = _middling(recipe, passes)
    device = parallel.device()
    batches = [pack(rows, pass_length(rows, recipe.row_length), 0).to(device) for rows in chosen]
    shape = recipe.tower.tokens, recipe.tower.width
    features = [
        torch.randn(len(batch.images), *shape, dtype=dtype_of(recipe.dtype, device), device=device) for batch in batches
    ]
    supervised = sum(len(batch.target) for batch in batches)
    began = 0.0
    for step in range(WARM + TIMED):
        if step == WARM:
            began = time.monotonic()
        for batch, shown in zip(batches, features, strict=True):
            (model.packed_loss(batch, shown if batch.images else None) / supervised).backward()
        optimizer.step(1.0, recipe.clip)
    total = recipe.total_steps(max(len(passes) // recipe.passes_per_step, 1))
    seconds = (time.monotonic() - began) / TIMED
    tokens = sum(int((batch.groups >= 0).sum()) for batch in batches)
    return Measured(
        seconds_per_step=seconds,
        seconds=seconds * total,
        tokens_per_second=tokens / seconds,
        peak_memory=memory_held(),
    )


def _model(recipe: Recipe) -> tuple[MultimodalLlama, MasterAdamW]:
    """As the stages make them, trained from nothing."""
    device = parallel.device()
    lm = load_base_lm(recipe, device)
    projector = Projector(recipe.tower.width, recipe.projector_hidden, lm.config.hidden_size)
    projector.to(device, dtype_of(recipe.dtype, device))
    model, optimizer = assemble(projector, lm, recipe)
    if recipe.steps is None or recipe.steps >= COMPILE_FROM:
        compile_layers(model.causal_lm.model.layers)
    return model, optimizer


def _middling(recipe: Recipe, passes: list[Pass]) -> list[Pass]:
    """The passes of the step whose size, padding included, is nearest to the mean."""

    def size(step: list[Pass]) -> int:
        return sum(len(rows) * pass_length(rows, recipe.row_length) for rows in step)

    many = recipe.passes_per_step
    steps = [passes[at : at + many] for at in range(0, max(len(passes) - many, 0) + 1, many)]
    mean = sum(map(size, steps)) / len(steps)
    return min(steps, key=lambda step: abs(size(step) - mean))
