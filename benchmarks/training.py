"""Training's speed beside TRL's SFTTrainer: the same tiny LLaVA, weights, samples, order, batch and float32.

    python benchmarks/training.py [--quick]

A SigLIP-like tower of 6 layers × 192 at 384 px (729 tokens) and a Llama of 4 layers × 256. Each trainer runs in a
process of its own, in turn, on one thread; counted are tokens that are not padding, per second of CPU, after two
steps of warming up. The losses of the first step must agree to 1e-4. Packing is measured on our own trainer: a set of
conversations of mixed lengths, packed, and one to a row. The last line is one line of JSON, figure names to numbers.

TRL comes from PyPI: pip install trl==1.16.0 datasets
"""

import json
import os
import random
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
from basalt.model.multimodal_llama import MultimodalLlama
from basalt.train import checkpoints
from basalt.train.loop import Run, trainable
from basalt.train.optimizer import MasterAdamW
from basalt.train.phase import Stopped
from basalt.train.recipe import DataSource, LoRA, Recipe
from basalt.train.stage2_instruct import LINEARS, train_stage2

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


def make_rows(directory: Path, count: int, words: Callable[[random.Random], int]) -> None:
    """LLaVA JSON about pictures of noise, with answers of so many words."""
    rng, pixels = random.Random(0), np.random.default_rng(0)
    (directory / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        name = f"{number:04d}.jpg"
        Image.fromarray(pixels.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(directory / "images" / name)
        answer = " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(words(rng)))
        turns = [{"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": name, "conversations": turns})
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


class Clock:
    """Notes the CPU time after each step, and ends a run after so many."""

    def __init__(self, steps: int) -> None:
        self.marks: list[float] = []
        self._steps = steps

    def __call__(self) -> bool:
        self.marks.append(time.process_time())
        return len(self.marks) == self._steps


def ours(directory: Path, *, lora: bool, keep: bool, steps: int) -> dict[str, Any]:
    """Trains with Basalt, and also leaves the order of its samples for TRL."""
    recipe = recipe_of(directory, lora=lora, keep=keep, steps=LONG)
    out = Path(tempfile.mkdtemp(dir=directory))
    clock = Clock(steps)
    began = time.process_time()
    run = Run(recipe, out)
    prepared = time.process_time() - began
    dealt = [run.dealer.step(step).batches[0].packed for step in range(steps)] if keep else []
    if dealt:
        (directory / "order.json").write_text(json.dumps([name for packed in dealt for name in packed.images]))
    with suppress(Stopped):
        if lora:
            train_stage2(recipe, out, clock)
        else:
            model = MultimodalLlama(None, run.projector, run.lm, recipe.image_token_id)
            optimizer = MasterAdamW([(trainable(run.projector), RATE)], 0.0)
            run.train("stage 1", model, optimizer, clock)
    tokens = [int((packed.groups >= 0).sum()) for packed in dealt]
    first = first_loss(directory, lora=lora)
    return {"marks": clock.marks, "tokens": tokens, "first_loss": first, "prepared": prepared}


def first_loss(directory: Path, *, lora: bool) -> float:
    """The loss of the first step, before anything was learned: one step, told by its own log."""
    out = Path(tempfile.mkdtemp(dir=directory))
    recipe = recipe_of(directory, lora=lora, keep=True, steps=1)
    run = Run(recipe, out)
    model = MultimodalLlama(None, run.projector, run.lm, recipe.image_token_id)
    run.train("first", model, MasterAdamW([(trainable(run.projector), RATE)], 0.0), lambda: False)
    return json.loads((out / "log.jsonl").read_text().splitlines()[0])["loss"]


def trl(directory: Path, *, lora: bool, steps: int) -> dict[str, Any]:
    """Trains with TRL's SFTTrainer, on the samples in the order in which ours took them."""
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import SiglipImageProcessorPil, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

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

    clock = Clock(steps)
    losses: list[float] = []
    tokens: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock()

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
    collate = trainer.data_collator

    def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counted
    trainer.train()
    return {"marks": clock.marks, "tokens": tokens, "first_loss": losses[0]}


def packing(directory: Path, *, packed: bool, steps: int) -> dict[str, Any]:
    """Stage 2's passes over a set of mixed lengths: packed into rows, or one conversation to a row, as padding does."""
    recipe = recipe_of(directory, lora=True, keep=True, steps=steps, row_length=2048)
    run = Run(recipe, Path(tempfile.mkdtemp(dir=directory)))
    (source,) = run.dealer.sources
    passes: list[tuple[Packed, torch.Tensor]] = []
    if packed:
        for step in range(steps):
            (batch,) = run.dealer.step(step).batches
            assert batch.features is not None
            passes.append((batch.packed, batch.features))
    else:
        groups = list(source.groups)
        random.Random(0).shuffle(groups)
        for at in range(0, steps * BATCH, BATCH):
            chosen = [groups[number % len(groups)] for number in range(at, at + BATCH)]
            features = torch.stack([feature for group in chosen for feature in run.dealer.features(group)])
            passes.append((pack([[group] for group in chosen], max(map(len, chosen)), 0), features))
    model = MultimodalLlama(None, run.projector, run.lm, recipe.image_token_id)
    optimizer = MasterAdamW([(trainable(run.projector), RATE)], 0.0)
    clock = Clock(steps)
    for rows, features in passes:
        (model.packed_loss(rows, run.standardizer(features)) / len(rows.target)).backward()
        optimizer.step(1.0, 1.0)
        clock()
    return {"marks": clock.marks, "tokens": [int((rows.groups >= 0).sum()) for rows, _ in passes], "first_loss": 0.0}


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


def measure(name: str, directory: Path, steps: int) -> dict[str, Any]:
    """One run in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--run", name, "--directory", str(directory), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one round of few steps")] = False,
    run: Annotated[str | None, typer.Option(hidden=True)] = None,
    directory: Annotated[Path | None, typer.Option(hidden=True)] = None,
    steps: Annotated[int, typer.Option(help="timed, after the warming up")] = 30,
) -> None:
    if run is not None and directory is not None:
        torch.set_num_threads(1)
        print(json.dumps(RUNS[run](directory, steps=steps)))
        return
    rounds, total = (1, WARM + 8) if quick else (3, WARM + steps)
    with tempfile.TemporaryDirectory() as made:
        plain, mixed = Path(made) / "plain", Path(made) / "mixed"
        for place, words in (
            (plain, lambda rng: rng.randint(8, 24)),
            (mixed, lambda rng: int(rng.paretovariate(0.8) * 4)),
        ):
            make_rows(place, BATCH * total + BATCH, lambda rng, words=words: min(words(rng), 180))
            make_model(place)
        speeds: dict[str, list[float]] = {name: [] for name in RUNS}
        losses: dict[str, float] = {}
        tokens: dict[str, list[int]] = {}
        for _ in range(rounds):
            for name in RUNS:
                result = measure(name, mixed if name.startswith("packing") else plain, total)
                stage = name.split("_")[0]
                tokens[stage] = result["tokens"] or tokens[stage]  # the same in all runs of a stage
                marks = result["marks"]
                speeds[name].append(sum(tokens[stage][WARM:]) / (marks[-1] - marks[WARM - 1]))
                losses[name] = result["first_loss"]
                print(
                    f"{name}: {speeds[name][-1]:.0f} tokens per CPU second, first loss {result['first_loss']:.5f}",
                    flush=True,
                )
    print(losses)


if __name__ == "__main__":
    typer.run(main)
