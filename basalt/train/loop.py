"""The training loop both stages share: steps, learning rates, checkpoints, and a line of figures as it goes."""

import ctypes
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from basalt.data.grouping import fill_rows
from basalt.data.preprocess import TEMPLATES, Tokenizer
from basalt.model.multimodal_llama import MultimodalLlama
from basalt.model.projector import Projector
from basalt.train.data import Batch, Dealer, prefetched, prepare
from basalt.train.recipe import Recipe, RecipeError

MAY_CHANGE = ("steps", "decay", "checkpoint_every")  # when a run goes on
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
COMPILE_FROM = 100  # steps: in fewer, compiling takes longer than it saves


class Standardizer(nn.Module):
    """Per-channel mean and deviation of the tower's features over the training images, `[tower_dim]` each."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def measure(self, features: Tensor) -> None:
        flat = features.float().flatten(0, -2)
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0).clamp(min=1e-3))

    def forward(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.std


class MasterAdamW:
    """AdamW on float32 copies of bf16 parameters: bf16 alone loses the small steps of a low learning rate."""

    def __init__(self, groups: list[tuple[list[nn.Parameter], float]], weight_decay: float) -> None:
        self.parameters = [parameter for parameters, _ in groups for parameter in parameters]
        self.masters = [parameter.detach().float().clone().requires_grad_() for parameter in self.parameters]
        of = dict(zip(self.parameters, self.masters, strict=True))
        self.peaks = [rate for _, rate in groups]
        self.adamw = torch.optim.AdamW(
            [{"params": [of[parameter] for parameter in parameters], "lr": rate} for parameters, rate in groups],
            betas=(0.9, 0.999),
            weight_decay=weight_decay,
        )

    def step(self, factor: float, clip: float) -> float:
        """One update with every learning rate times `factor`; returns the gradient's norm before clipping."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, clip)
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)
        return float(norm)


def keep_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe of a run.

    Raises:
        RecipeError: the run was begun with another one, in more than how long it goes on.
    """
    if path.is_file():
        before, now = json.loads(path.read_text()), json.loads(recipe.model_dump_json())
        changed = [name for name in now if now[name] != before.get(name) and name not in MAY_CHANGE]
        if changed:
            told = "; ".join(f"{name}: {before.get(name)} before, {now[name]} now" for name in changed)
            raise RecipeError(f"{path.parent} was begun with another recipe ({told}): name another directory")
    path.write_text(recipe.model_dump_json(indent=2))


def rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then level, then cosine to zero over the last `decay` share of the steps."""
    warmup = max(round(recipe.warmup * recipe.steps), 1)
    decay_from = max(round((1 - recipe.decay) * recipe.steps), warmup)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_from:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - decay_from) / max(recipe.steps - decay_from, 1)))


class Run:
    """One training run in its directory: the recipe's model and data, and what has been learned so far."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        torch.manual_seed(recipe.seed)
        directory.mkdir(parents=True, exist_ok=True)
        keep_recipe(recipe, directory / "recipe.json")
        self.recipe, self.directory = recipe, directory
        self.checkpoint = directory / "checkpoint.pt"
        self.lm = load_base_lm(recipe)
        template = (TEMPLATES / recipe.chat_template).read_text()
        self.tokenizer = Tokenizer(
            AutoTokenizer.from_pretrained(recipe.base_lm), template, recipe.image_token_id, recipe.tower.tokens
        )
        sources = [prepare(source, recipe, self.tokenizer) for source in recipe.data]
        self.dealer = Dealer(sources, recipe, pad_id=0)
        self.held_out = self._held_out()
        self.standardizer = Standardizer(recipe.tower.width)
        self.projector = Projector(recipe.tower.width, recipe.projector_hidden, self.lm.config.hidden_size)
        if recipe.start is None:
            self._start_afresh()
        else:
            state = torch.load(recipe.start / "checkpoint.pt", weights_only=True)
            self.projector.load_state_dict(state["projector"])
            self.standardizer.load_state_dict(state["standardizer"])
        self.projector.to(torch.bfloat16)

    def _start_afresh(self) -> None:
        caches = [source.features for source in self.dealer.sources if source.features is not None]
        sample = [cache[name] for cache in caches for name in list(cache.rows)[:: max(len(cache.rows) // 512, 1)]]
        self.standardizer.measure(torch.stack(sample))
        self.projector.scale_output(float(self.lm.get_input_embeddings().weight.float().std()))

    def _held_out(self) -> list[Batch]:
        if self.recipe.held_out is None:
            return []
        source = prepare(self.recipe.held_out, self.recipe, self.tokenizer)
        dealer = Dealer([source], self.recipe, pad_id=0)
        rows = fill_rows(source.groups[:96], self.recipe.row_length, random.Random(0))
        size = self.recipe.rows_per_pass
        return [dealer.batch(rows[at : at + size]) for at in range(0, len(rows), size)]

    def train(self, model: MultimodalLlama, optimizer: MasterAdamW) -> None:
        """Runs the recipe's steps, going on from this run's checkpoint if there is one."""
        keep_freed_memory()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        first = self._resume(trained, optimizer)
        if self.recipe.steps - first >= COMPILE_FROM:
            compile_layers(model.causal_lm.model.layers)
        log = (self.directory / "log.jsonl").open("a")
        seen, loss_sum, count, began = 0, 0.0, 0, time.monotonic()
        steps = range(first, self.recipe.steps)
        for step, batches in zip(steps, prefetched(self.dealer.step, steps), strict=True):
            supervised = sum(len(batch.packed.target) for batch in batches)
            for batch in batches:
                loss = self._loss(model, batch)
                (loss / supervised).backward()
                loss_sum += float(loss.detach())
            norm = optimizer.step(rate_factor(step, self.recipe), self.recipe.clip)
            count += supervised
            seen += sum(int((batch.packed.groups >= 0).sum()) for batch in batches)
            last = step + 1 == self.recipe.steps
            if (step + 1) % 20 == 0 or last:
                figures: dict[str, float] = {
                    "step": step + 1,
                    "loss": round(loss_sum / count, 4),
                    "gradient_norm": round(norm, 3),
                    "tokens_per_second": round(seen / (time.monotonic() - began)),
                }
                if (step + 1) % 200 == 0 or last:
                    figures["held_out_loss"] = round(self.held_out_loss(model), 4)
                print(json.dumps(figures), flush=True)
                log.write(json.dumps(figures) + "\n")
                log.flush()
                seen, loss_sum, count, began = 0, 0.0, 0, time.monotonic()
            if (step + 1) % self.recipe.checkpoint_every == 0 or last:
                self._save(step + 1, trained, optimizer)

    def _loss(self, model: MultimodalLlama, batch: Batch) -> Tensor:
        features = None if batch.features is None else self.standardizer(batch.features)
        return model.packed_loss(batch.packed, features)

    @torch.no_grad()
    def held_out_loss(self, model: MultimodalLlama) -> float:
        """Mean loss a token on the held-out rows; NaN without any."""
        if not self.held_out:
            return math.nan
        total = sum(float(self._loss(model, batch)) for batch in self.held_out)
        return total / sum(len(batch.packed.target) for batch in self.held_out)

    def _save(self, step: int, trained: dict[str, nn.Parameter], optimizer: MasterAdamW) -> None:
        state = {
            "step": step,
            "projector": {name: value.float() for name, value in self.projector.state_dict().items()},
            "standardizer": self.standardizer.state_dict(),
            "masters": dict(zip(trained, optimizer.masters, strict=True)),
            "optimizer": optimizer.adamw.state_dict(),
        }
        partial = self.directory / "checkpoint.pt.partial"
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _resume(self, trained: dict[str, nn.Parameter], optimizer: MasterAdamW) -> int:
        if not self.checkpoint.is_file():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        with torch.no_grad():
            for (name, parameter), master in zip(trained.items(), optimizer.masters, strict=True):
                master.copy_(state["masters"][name])
                parameter.copy_(master)
        optimizer.adamw.load_state_dict(state["optimizer"])
        self.standardizer.load_state_dict(state["standardizer"])
        print(f"going on from step {state['step']}", flush=True)
        return state["step"]


def load_base_lm(recipe: Recipe) -> Any:
    """The frozen base LM, bf16."""
    # Measured on two CPU cores with rows of 320 tokens: the plain product beats the fused CPU kernel's backward.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    return AutoModelForCausalLM.from_pretrained(
        recipe.base_lm, dtype=torch.bfloat16, attn_implementation=attention
    ).requires_grad_(False)


def compile_layers(layers: nn.ModuleList) -> None:
    """Compiles the LM's layers: once for all of them, and once for each size of a pass. Without a C++ compiler
    training on a CPU runs them as they are, which takes about half as long again."""
    if torch.cuda.is_available() or has_compiler():
        torch._dynamo.config.recompile_limit = 64  # sizes, with and without gradients
        for layer in layers:
            layer.compile(dynamic=False)


def has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile calls on Linux is there: `$CXX`, or g++; it tries no other."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def keep_freed_memory() -> None:
    """Tells glibc to reuse what is freed instead of handing it back: a step's many short-lived tensors otherwise
    cost a page fault for every 4 KiB, some 15 % of a step on a CPU. What is over 32 MiB, the logits, whose sizes
    never repeat, still goes back: kept, it would fragment the heap without end."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            libc.mallopt(option, value)


def named(parameters: Iterator[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The trainable ones, in order."""
    return [parameter for _, parameter in parameters if parameter.requires_grad]
