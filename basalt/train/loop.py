"""One run of a stage: the recipe's model and data, and its steps through the LM."""

import ctypes
import os
import random
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from basalt.data.grouping import fill_rows
from basalt.data.preprocess import TEMPLATES, Tokenizer
from basalt.model.last_layer import train_by_segments
from basalt.model.multimodal_llama import MultimodalLlama
from basalt.model.precision import dtype_of, name_of
from basalt.model.projector import Projector
from basalt.train import checkpoints, parallel
from basalt.train.data import Batch, Dealer, Dealt, Source, prepare
from basalt.train.environment import keep_environment
from basalt.train.flops import FlopCounter, peak
from basalt.train.lora import add_lora
from basalt.train.optimizer import MasterAdamW, rate_factor
from basalt.train.phase import Phase
from basalt.train.progress import Looking, Tally
from basalt.train.recipe import Recipe, RecipeError
from basalt.train.said import log
from basalt.train.samples import Sample, answers, sample_of
from basalt.train.start import read_start
from basalt.train.stop import Stop, never

MAY_CHANGE = ("steps", "epochs", "decay", "checkpoint_every", "split", "keep_start")  # when a run goes on
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
PLAIN_UP_TO = 384  # tokens of a row; measured on two CPU cores
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


def keep_recipe(recipe: Recipe, path: Path) -> Recipe:
    """Writes the recipe of a run, its precision settled: by this machine when it begins, as it began when it goes on.
    Of processes that train together the first writes, and the others read what it settled.

    Raises:
        RecipeError: the run was begun with another one, in more than how long it goes on.
    """
    first = Recipe.model_validate_json(path.read_text()) if path.is_file() else None
    if recipe.dtype == "auto":
        here = name_of(dtype_of("auto", parallel.device()))
        recipe = recipe.model_copy(update={"dtype": here if first is None else first.dtype})
    if first is not None:
        before, now = first.model_dump(mode="json"), recipe.model_dump(mode="json")
        changed = [name for name in now if now[name] != before[name] and name not in MAY_CHANGE]
        if changed:
            told = "; ".join(f"{name}: {before[name]} before, {now[name]} now" for name in changed)
            raise RecipeError(f"{path.parent} was begun with another recipe ({told}): name another directory")
    if parallel.rank_and_world()[0] == 0:
        partial = path.with_suffix(".partial")
        partial.write_text(recipe.model_dump_json(indent=2))
        partial.replace(path)
    return recipe


def begun(directory: Path) -> bool:
    return bool(checkpoints.saved(directory))


class Run:
    """One training run in its directory: the recipe's model and data, and what has been learned so far."""

    def __init__(self, recipe: Recipe, directory: Path, stop: Stop = never) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with parallel.leader_first():
            recipe = keep_recipe(recipe, directory / "recipe.json")
        if parallel.rank_and_world()[0] == 0:
            keep_environment(recipe, directory)
        world = parallel.rank_and_world()[1]
        if recipe.passes_per_step % world:
            raise RecipeError(f"passes_per_step = {recipe.passes_per_step} cannot be shared by {world} processes alike")
        self.recipe, self.directory = recipe, directory
        self.device = parallel.device()
        self.lm = load_base_lm(recipe, self.device)
        template = (TEMPLATES / recipe.chat_template).read_text()
        self.tokenizer = Tokenizer(
            AutoTokenizer.from_pretrained(recipe.base_lm), template, recipe.image_token_id, recipe.tower.tokens
        )
        lm_dim = self.lm.config.hidden_size
        self.start = read_start(recipe, lm_dim)  # now: reading the data and computing features may take hours
        with Looking(directory / "features") as tell:
            held_out = [] if recipe.held_out is None else [recipe.held_out]
            sources = prepare([*recipe.data, *held_out], recipe, self.tokenizer, stop, tell)
        kept = sources.pop() if held_out else None
        self.held_out = [] if kept is None else self._batches(kept)
        self.samples = self._samples([kept] if kept else sources)
        self.dealer = Dealer(sources, recipe, pad_id=0)
        self.steps = recipe.total_steps(self.dealer.steps_per_epoch())
        self.standardizer = Standardizer(recipe.tower.width)
        torch.ones(1).sqrt()  # MKL's vector functions, first called by two threads at once, may round otherwise
        torch.manual_seed(recipe.seed)  # here, as computing features on the way draws numbers too
        self.projector = Projector(recipe.tower.width, recipe.projector_hidden, lm_dim)
        self._begin()
        self.projector.to(self.device, dtype_of(recipe.dtype, self.device))
        self.standardizer.to(self.device)

    def _begin(self) -> None:
        """Puts projector and standardizer where training begins: afresh, or computing what `start` computes."""
        start = self.start
        if start is not None and start.standardizer is not None:
            self.standardizer.load_state_dict(start.standardizer)
            self.projector.load_state_dict(start.projector.state_dict())
            return
        self._measure_features()
        if start is None:
            self.projector.scale_output(float(self.lm.get_input_embeddings().weight.float().std()))
        else:
            raw = start.projector.unfolded(self.standardizer.mean, self.standardizer.std)
            self.projector.load_state_dict(raw.state_dict())

    def _measure_features(self) -> None:
        """Fits the standardizer to some 512 images of each folder or tar; without images it changes nothing."""
        caches = {id(cache): cache for source in self.dealer.sources if (cache := source.features) is not None}
        sample = [
            feature.cpu()
            for cache in caches.values()
            for feature in cache.of(list(cache.rows)[:: max(len(cache.rows) // 512, 1)]).values()
        ]
        if sample:
            self.standardizer.measure(torch.stack(sample))

    def _samples(self, sources: list[Source]) -> list[Sample]:
        """The first questions about images that are all there."""
        dealer = Dealer(sources, self.recipe, pad_id=0)
        about = (group for source in sources for group in source.groups if group.images)
        shown = ((group, dealer.features(group)) for group in about)
        whole = ((group, features) for group, features in shown if len(features) == len(group.images))
        return [sample_of(*each, self.tokenizer) for each in islice(whole, self.recipe.samples)]

    def _batches(self, source: Source) -> list[Batch]:
        """The first rows of held-out data."""
        dealer = Dealer([source], self.recipe, pad_id=0)
        rows = fill_rows(source.groups[:96], self.recipe.row_length, random.Random(0))
        size = self.recipe.rows_per_pass
        return [dealer.batch(rows[at : at + size]) for at in range(0, len(rows), size)]

    def train(self, name: str, model: MultimodalLlama, optimizer: MasterAdamW, stop: Stop) -> None:
        """Runs the recipe's steps, going on from this run's checkpoint if there is one.

        Raises:
            Stopped: `stop` said so.
        """
        recipe = self.recipe
        keep_freed_memory()
        layers = model.causal_lm.model.layers
        flops, peak_rate = FlopCounter(model), peak(self.device, dtype_of(recipe.dtype, self.device))
        if self.steps >= COMPILE_FROM and compile_layers(layers):
            self._compile(model, optimizer)

        def work(step: int, dealt: Dealt) -> Tally:
            batches = dealt.batches
            total: Tensor | float = 0.0
            for batch in batches:
                loss = self._loss(model, batch)
                (loss / dealt.supervised).backward()
                total = total + loss.detach()
            factor = rate_factor(step, self.steps, warmup=recipe.warmup, decay=recipe.decay)
            norm = optimizer.step(factor, recipe.clip)
            positions = sum(batch.packed.ids.numel() for batch in batches)
            tokens = sum(int((batch.packed.groups >= 0).sum()) for batch in batches)
            means: dict[str, tuple[Tensor | float, float]] = {
                "loss": (total, sum(len(batch.packed.target) for batch in batches)),
                "gradient_norm": (norm, 1),
                "learning_rate": (optimizer.peaks[-1] * factor, 1),
                "padding": (positions - tokens, positions),
            }
            at_peak = sum(flops.of(batch.packed) for batch in batches) / peak_rate if peak_rate else 0.0
            return Tally(means, tokens, at_peak)

        parent = None if self.start is None else self.start.parent

        def load(state: dict[str, Any]) -> None:
            if (before := state.get("parent")) != parent:
                raise RecipeError(
                    f"{self.directory} was begun from {before or 'no assistant'}, and {recipe.start} is "
                    f"{parent or 'none'} now: name another directory"
                )
            optimizer.load(state["optimizer"])
            self.standardizer.load_state_dict(state["standardizer"])

        phase = Phase(
            name=name,
            directory=self.directory,
            steps=self.steps,
            checkpoint_every=recipe.checkpoint_every,
            deal=self.dealer.step,
            work=work,
            state=lambda: {
                "steps": self.steps,
                "parent": parent,
                "projector": {name: value.float() for name, value in self.projector.state_dict().items()},
                "standardizer": self.standardizer.state_dict(),
                "optimizer": optimizer.state(),
            },
            load=load,
            stop=stop,
            evaluate=lambda: self.evaluate(model),
        )
        with torch.compiler.set_stance("eager_on_recompile"):  # see `_compile`
            phase.run()

    def _compile(self, model: MultimodalLlama, optimizer: MasterAdamW) -> None:
        """Has the layers compiled by the run's first passes, whatever step it goes on from.

        What is compiled depends on the sizes that come first, and two kernels for one size may round otherwise: a run
        that goes on would end with other weights than one never stopped. What these passes' kernels do not fit is run
        as it is.
        """
        log.info("Compiling the LM's layers")
        for step in range(2):
            for batch in self.dealer.step(step).batches[:2]:
                self._loss(model, batch).backward()
        for parameter in optimizer.parameters:
            parameter.grad = None
        with torch.no_grad():
            for batch in self.held_out[:2]:
                self._loss(model, batch)

    def _loss(self, model: MultimodalLlama, batch: Batch) -> Tensor:
        features = batch.features
        if features is not None:
            features = self.standardizer(features.to(self.device, non_blocking=True))
        return model.packed_loss(batch.packed.to(self.device), features)

    def evaluate(self, model: MultimodalLlama) -> dict[str, Any]:
        """The loss on the held-out rows, and answers to some of them; without any, to some of the rows trained on."""
        told: dict[str, Any] = {}
        if self.held_out:
            told["held_out_loss"] = self.held_out_loss(model)
        if self.samples:
            told["samples"] = answers(self.samples, model, self.standardizer, self.tokenizer)
        return told

    @torch.no_grad()
    def held_out_loss(self, model: MultimodalLlama) -> float:
        """Mean loss a token on the held-out rows."""
        total = sum(float(self._loss(model, batch)) for batch in self.held_out)
        return total / sum(len(batch.packed.target) for batch in self.held_out)


def nf4() -> BitsAndBytesConfig:
    """QLoRA's quantisation of the frozen LM: 4-bit NormalFloat, its scales quantised too (Dettmers et al. 2023)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_base_lm(recipe: Recipe, device: torch.device) -> Any:
    """The frozen base LM, in the recipe's precision or quantised.

    Raises:
        RecipeError: it is a directory's name, and no directory; or not to be had from the hub.
    """
    if not recipe.base_lm.is_dir() and (recipe.base_lm.is_absolute() or len(recipe.base_lm.parts) > 2):  # no hub's id
        raise RecipeError(
            f"base_lm: there is no directory {recipe.base_lm}: put a Hugging Face model there "
            "(for basalt-tiny, `basalt models prepare` does so)"
        )
    quantized = None if recipe.quantize is None else nf4()
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(
            recipe.base_lm, dtype=dtype_of(recipe.dtype, device), quantization_config=quantized
        )
    except OSError as error:
        if error.errno is not None:  # the system's, not transformers'
            raise
        raise RecipeError(f"base_lm: {recipe.base_lm} is neither here nor to be had: {error}") from error
    return made_ready(lm, recipe, device)


def made_ready(lm: Any, recipe: Recipe, device: torch.device) -> Any:
    """The LM frozen and on its device, attending in the way that is fastest for the recipe's rows. Where it is cut up
    among several processes, none has the whole of it on its device at any time."""
    lm.requires_grad_(False)
    if device.type == "cpu" and recipe.row_length <= PLAIN_UP_TO:
        # The plain product over whole rows is the faster one for short rows: compiled, it has no kernel's start and no
        # fused kernel's backward to pay.
        lm.set_attn_implementation("eager")
    else:
        train_by_segments(lm)
    if recipe.shard and parallel.rank_and_world()[1] > 1:
        cut_up(lm.model.layers)
    if recipe.quantize is None:  # what is quantised was put there as it was loaded
        lm.to(device)
    if recipe.recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def cut_up(layers: nn.ModuleList) -> None:
    """Shares the layers out among the processes: each goes from the CPU to the device by itself, and what of it is not
    this process's is gone before the next one comes."""
    parallel.shard(layers)
    for layer in layers:
        assert isinstance(layer, FSDPModule)
        layer.set_reshard_after_forward(True)  # FSDP2 leaves what lies in no other of its modules whole: all of them


def compile_layers(layers: nn.ModuleList) -> bool:
    """Has the LM's layers compiled when they are first run: once for all of them and for all sizes of a pass. Without a
    compiler, for which it is False, they are run as they are, which takes about half as long again on a CPU."""
    on_gpu = parallel.device().type == "cuda"
    if not has_compiler(on_gpu=on_gpu):
        wanted = "C compiler ($CC, gcc or clang)" if on_gpu else "C++ compiler ($CXX or g++)"
        log.warning(f"the LM's layers are not compiled, which would be faster: there is no {wanted}")
        return False
    torch._dynamo.config.recompile_limit = 64  # sizes, with and without gradients
    for layer in layers:
        layer.compile(dynamic=True)
    return True


def has_compiler(*, on_gpu: bool = False) -> bool:
    """Whether the compiler that torch.compile calls on Linux is there, for a CPU's kernels `$CXX` or g++, for starting
    a GPU's `$CC`, gcc or clang; it tries no other."""
    variable, known = ("CC", ("gcc", "clang")) if on_gpu else ("CXX", ("g++",))
    return any(map(shutil.which, [os.environ[variable]] if variable in os.environ else known))


def keep_freed_memory() -> None:
    """Tells glibc to reuse what is freed instead of handing it back: a step's many short-lived tensors otherwise
    cost a page fault for every 4 KiB, some 15 % of a step on a CPU. What is over 32 MiB, the logits, whose sizes
    never repeat, still goes back: kept, it would fragment the heap without end."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            libc.mallopt(option, value)


def assemble(
    projector: Projector, lm: Any, recipe: Recipe, adapter: Path | None = None
) -> tuple[MultimodalLlama, MasterAdamW]:
    """The model and the optimizer of what is trained of it: the projector, and the LoRA where the recipe has one.

    Args:
        adapter: whose weights the LoRA begins with; None for a fresh one.
    """
    rates = [(trainable(projector), recipe.projector_learning_rate)]
    if recipe.lora is not None:
        lm = add_lora(lm, recipe.lora, adapter)
        rates.append((trainable(lm), recipe.lora.learning_rate))
    lm.train(recipe.recompute)  # transformers recomputes in training mode only; there is no dropout it would switch on
    return MultimodalLlama(None, projector, lm, recipe.image_token_id), MasterAdamW(rates, recipe.weight_decay)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
