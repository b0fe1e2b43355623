"""Training's speed beside TRL's SFTTrainer: the same tiny LLaVA, weights, samples, order, batch and float32.

    python benchmarks/training.py [--quick]

A SigLIP-like tower of 6 layers × 192 at 384 px (729 tokens) and a Llama of 4 layers × 256. The trainers run in
processes of their own, on one thread each, and take their steps by turns, so that what else the machine does hits all
alike. Counted are tokens that are not padding, per second of CPU, after two steps of warming up; told is the median
over the steps. The losses of the first step must agree to 1e-4. Packing is measured on our own trainer: conversations
of mixed lengths, half of them with a picture, packed, and one to a row. The last line is one line of JSON.

TRL comes from PyPI: pip install trl==1.16.0 datasets
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from basalt.assistants import TowerSpec
from basalt.data.packing import Packed, pack
from basalt.data.preprocess import TEMPLATES
from basalt.train import checkpoints
from basalt.train.loop import Run, assemble
from basalt.train.lora import LINEARS
from basalt.train.recipe import DataSource, LoRA, Recipe
from basalt.train.stage2_instruct import train_stage2
from basalt.train.stop import Stopped, never

BATCH, VOCABULARY, LM_DIM, TOWER_DIM, TOKENS, SIDE = 4, 4096, 256, 192, 729, 384
IMAGE_TOKEN = 3
RATE = 2e-4
WARM = 2  # steps
LONG = 1000  # steps of the run whose first ones are timed: in so long a one, ours compiles
GOALS = {"stage1_cached": 2.5, "stage1_live": 1.7, "stage2_cached": 2.0, "stage2_live": 1.5, "packing": 1.5}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and four special tokens before them."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    vocabulary = {token: n for n, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text()
    return tokenizer


def make_model(directory: Path) -> None:
    """The LLaVA of transformers, and the same tower, LM and projector as a recipe names them."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=TOWER_DIM, intermediate_size=4 * TOWER_DIM, num_hidden_layers=6, num_attention_heads=3,
        image_size=SIDE, patch_size=14, vision_use_head=False,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=LM_DIM, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=TOKENS,
        vision_feature_select_strategy="full", vision_feature_layer=-2,
    )  # fmt: skip
    llava = LlavaForConditionalGeneration(config)
    llava.save_pretrained(directory / "llava")
    llava.model.vision_tower.save_pretrained(directory / "tower")
    lm = LlamaForCausalLM(text)
    lm.model.load_state_dict(llava.model.language_model.state_dict())
    lm.lm_head.load_state_dict(llava.lm_head.state_dict())
    lm.save_pretrained(directory / "lm")
    make_tokenizer().save_pretrained(directory / "lm")
    unchanged = {"mean": torch.zeros(TOWER_DIM), "std": torch.ones(TOWER_DIM)}
    projector = llava.model.multi_modal_projector.state_dict()
    checkpoints.save(directory / "start", 1, {"projector": projector, "standardizer": unchanged})


def make_rows(directory: Path, count: int, words: Callable[[random.Random], int], *, pictures: float = 1.0) -> None:
    """LLaVA JSON with answers of so many words; so great a share is about pictures, of noise."""
    rng, pixels = random.Random(0), np.random.default_rng(0)
    (directory / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        answer = " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(words(rng)))
        row: dict[str, Any] = {"id": str(number)}
        question = "Write something."
        if rng.random() < pictures:
            row["image"], question = f"{number:04d}.jpg", "<image>\nDescribe the image."
            noise = Image.fromarray(pixels.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
            noise.save(directory / "images" / row["image"])
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append(row | {"conversations": turns})
    (directory / "rows.json").write_text(json.dumps(rows))


def recipe_of(directory: Path, *, lora: bool, keep: bool, steps: int, row_length: int = 1400) -> Recipe:
    """Four samples a step: a second one does not fit into a row."""
    return Recipe(
        tower=TowerSpec(
            kind="siglip", id=str(directory / "tower"), image_size=SIDE, tokens=TOKENS, width=TOWER_DIM, fit="resize"
        ),
        base_lm=directory / "lm",
        image_token_id=IMAGE_TOKEN,
        projector_hidden=LM_DIM,
        data=[DataSource(rows=directory / "rows.json", images=directory / "images")],
        start=directory / "start",
        lora=LoRA(rank=16, alpha=32, learning_rate=RATE) if lora else None,
        projector_learning_rate=RATE,
        steps=steps,
        rows_per_pass=BATCH,
        row_length=row_length,
        warmup=0.0,
        checkpoint_every=LONG,
        dtype="float32",
        keep_features=keep,
        features=directory / "features",
    )


class Turns:
    """Tells the CPU time a step took, then waits for the next turn; ends a run after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps
        self._began = time.process_time()

    def __call__(self) -> bool:
        print(json.dumps({"step": time.process_time() - self._began}), flush=True)
        sys.stdin.readline()
        self._began = time.process_time()
        self._left -= 1
        return not self._left


def ours(directory: Path, *, lora: bool, keep: bool, steps: int) -> dict[str, Any]:
    recipe = recipe_of(directory, lora=lora, keep=keep, steps=LONG)
    out = Path(tempfile.mkdtemp(dir=directory))
    with suppress(Stopped):
        if lora:
            train_stage2(recipe, out, Turns(steps))
        else:
            run = Run(recipe, out)
            run.train("stage 1", *assemble(run.projector, run.lm, recipe), Turns(steps))
    return {"first_loss": first_loss(directory, lora=lora)}


def order(directory: Path, steps: int) -> tuple[list[str], list[int]]:
    """The images in the order in which our trainer takes them, and the tokens of each step."""
    run = Run(recipe_of(directory, lora=False, keep=True, steps=LONG), Path(tempfile.mkdtemp(dir=directory)))
    packed = [run.dealer.step(step).batches[0].packed for step in range(steps)]
    return [name for each in packed for name in each.images], [int((each.groups >= 0).sum()) for each in packed]


def first_loss(directory: Path, *, lora: bool) -> float:
    """The loss of the first step, before anything was learned: one step, told by its own log."""
    out = Path(tempfile.mkdtemp(dir=directory))
    recipe = recipe_of(directory, lora=lora, keep=True, steps=1)
    run = Run(recipe, out)
    run.train("first", *assemble(run.projector, run.lm, recipe), never)
    return json.loads((out / "log.jsonl").read_text().splitlines()[0])["loss"]


def trl(directory: Path, *, lora: bool, steps: int) -> dict[str, Any]:
    """Trains with TRL's SFTTrainer, on the samples in the order in which ours took them."""
    import datasets  # pyright: ignore[reportMissingImports]
    from transformers import SiglipImageProcessorPil, TrainerCallback
    from trl.trainer.sft_config import SFTConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.sft_trainer import SFTTrainer  # pyright: ignore[reportMissingImports]

    tokenizer = AutoTokenizer.from_pretrained(directory / "lm")
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token="<image>",
    )
    rows = {row["image"]: row for row in json.loads((directory / "rows.json").read_text())}
    order = json.loads((directory / "order.json").read_text())
    samples = {"images": [], "messages": []}
    for name in order:
        question, answer = (turn["value"] for turn in rows[name]["conversations"])
        samples["images"].append([str(directory / "images" / name)])
        samples["messages"].append(
            [{"role": "user", "content": question.removeprefix("<image>\n")}, {"role": "assistant", "content": answer}]
        )
    data = datasets.Dataset.from_dict(samples).cast_column("images", datasets.List(datasets.Image()))

    model: Any = LlavaForConditionalGeneration.from_pretrained(directory / "llava", dtype=torch.float32)
    model.requires_grad_(False)
    if lora:
        targets = rf".*language_model.*\.({'|'.join(LINEARS)})"
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)

    turns = Turns(steps)
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(dir=directory),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        assistant_only_loss=True,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=data, processing_class=processor, callbacks=[Watch()]
    )
    trainer.train()
    return {"first_loss": losses[0]}


def packing(directory: Path, *, packed: bool, steps: int) -> dict[str, Any]:
    """Stage 2's passes over a set of mixed lengths: packed into rows, or one conversation to a row, as padding does."""
    recipe = recipe_of(directory, lora=True, keep=True, steps=steps, row_length=2048)
    run = Run(recipe, Path(tempfile.mkdtemp(dir=directory)))
    (source,) = run.dealer.sources
    passes: list[tuple[Packed, torch.Tensor | None]] = []
    if packed:
        for step in range(steps):
            (batch,) = run.dealer.step(step).batches
            passes.append((batch.packed, batch.features))
    else:
        groups = list(source.groups)
        random.Random(0).shuffle(groups)
        for at in range(0, steps * BATCH, BATCH):
            chosen = [groups[number % len(groups)] for number in range(at, at + BATCH)]
            shown = [feature for group in chosen for feature in run.dealer.features(group)]
            rows = pack([[group] for group in chosen], max(map(len, chosen)), 0)
            passes.append((rows, torch.stack(shown) if shown else None))
    model, optimizer = assemble(run.projector, run.lm, recipe)
    turns = Turns(steps)
    for rows, features in passes:
        seen = None if features is None else run.standardizer(features)
        (model.packed_loss(rows, seen) / len(rows.target)).backward()
        optimizer.step(1.0, 1.0)
        turns()
    return {"tokens": [int((rows.groups >= 0).sum()) for rows, _ in passes]}


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "stage1_cached": partial(ours, lora=False, keep=True),
    "stage1_live": partial(ours, lora=False, keep=False),
    "stage1_trl": partial(trl, lora=False),
    "stage2_cached": partial(ours, lora=True, keep=True),
    "stage2_live": partial(ours, lora=True, keep=False),
    "stage2_trl": partial(trl, lora=True),
    "packing_packed": partial(packing, packed=True),
    "packing_padded": partial(packing, packed=False),
}


class Trainer:
    """A run in a process of its own, which waits after each step."""

    def __init__(self, name: str, directory: Path, steps: int) -> None:
        self.name = name
        command = [sys.executable, __file__, "--run", name, "--directory", str(directory), "--steps", str(steps)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log = (directory / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def told(self, what: str) -> Any:
        """The next value of this name that the run tells."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f'{{"{what}":'):
                return json.loads(line)[what]
        self._log.seek(0)
        raise SystemExit(f"{self.name} failed:\n{self._log.read()[-3000:]}")

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()


def by_turns(names: list[str], directory: Path, steps: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Runs trainers step by step; the CPU seconds of each step, and what each told in the end."""
    trainers: list[Trainer] = []
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:  # one after the other up to the first step's end
        trainers.append(Trainer(name, directory, steps))
        seconds[name].append(trainers[-1].told("step"))
    for _ in range(1, steps):
        for trainer in trainers:
            trainer.go_on()
            seconds[trainer.name].append(trainer.told("step"))
    told = {}
    for trainer in trainers:
        trainer.go_on()
        told[trainer.name] = trainer.told("told")
    return seconds, told


def stage(number: int, directory: Path, steps: int, tokens: list[int]) -> dict[str, float]:
    peer, *own = names = [f"stage{number}_{way}" for way in ("trl", "cached", "live")]
    seconds, told = by_turns(names, directory, steps)
    figures: dict[str, float] = {}
    for name in names:
        speeds = [count / spent for count, spent in zip(tokens, seconds[name], strict=True)][WARM:]
        figures[f"{name}_tokens_per_cpu_second"] = round(statistics.median(speeds))
        print(f"{name}: {statistics.median(speeds):.0f} tokens a CPU second, first loss {told[name]['first_loss']:.5f}")
    for name in own:
        ratios = [theirs / mine for theirs, mine in zip(seconds[peer], seconds[name], strict=True)][WARM:]
        low, middle, high = statistics.quantiles(ratios, n=4)
        figures[f"{name}_to_trl"] = round(middle, 2)
        print(f"{name}: {middle:.2f} x TRL [quartiles {low:.2f}, {high:.2f}], wanted {GOALS[name]}")
        apart = abs(told[name]["first_loss"] - told[peer]["first_loss"])
        if apart > 1e-4:
            raise SystemExit(f"the first losses of {name} and {peer} are {apart:.6f} apart: they do not train the same")
    return figures


def packed_to_padded(directory: Path, steps: int) -> dict[str, float]:
    names = ["packing_packed", "packing_padded"]
    seconds, told = by_turns(names, directory, steps)
    speeds = {name: sum(told[name]["tokens"][WARM:]) / sum(seconds[name][WARM:]) for name in names}
    ratio = speeds["packing_packed"] / speeds["packing_padded"]
    print(f"packing: {ratio:.2f} x padding, wanted {GOALS['packing']}")
    return {"packed_to_padded": round(ratio, 2)}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="a few steps")] = False,
    run: Annotated[str | None, typer.Option(hidden=True)] = None,
    directory: Annotated[Path | None, typer.Option(hidden=True)] = None,
    steps: Annotated[int, typer.Option(help="timed, after the warming up")] = 30,
) -> None:
    if run is not None and directory is not None:
        torch.set_num_threads(1)
        print(json.dumps({"told": RUNS[run](directory, steps=steps)}))
        return
    steps = WARM + (6 if quick else steps)
    with tempfile.TemporaryDirectory() as made:
        plain, mixed = Path(made) / "plain", Path(made) / "mixed"
        make_rows(plain, BATCH * steps + BATCH, lambda rng: rng.randint(8, 24))
        make_rows(mixed, 4 * BATCH * steps, lambda rng: min(int(rng.paretovariate(0.8) * 4), 180), pictures=0.5)
        make_model(plain)
        make_model(mixed)
        names, tokens = order(plain, steps)
        (plain / "order.json").write_text(json.dumps(names))
        figures = stage(1, plain, steps, tokens) | stage(2, plain, steps, tokens) | packed_to_padded(mixed, steps)
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
