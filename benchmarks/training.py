"""Training's speed beside TRL's SFTTrainer: the same tiny LLaVA, weights, samples, order, batch and dtype.

    python benchmarks/training.py [--quick]

A SigLIP-like tower of 6 layers × 192 at 384 px (729 tokens) and a Llama of 4 layers × 256. Both trainers are timed in
turn, A/B/A/B, on one thread, in non-padding tokens per CPU second after two warm-up steps; the first step's losses
must agree to 1e-4. The last line is one line of JSON, figure names to numbers.

TRL comes from PyPI: pip install trl==1.16.0 datasets
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from basalt.data.preprocess import TEMPLATES
from basalt.train.loop import Run
from basalt.train.recipe import Recipe
from basalt.train.stage1_align import train_stage1
from basalt.train.stage2_instruct import LINEARS, train_stage2

BATCH, VOCABULARY, LM_DIM, TOWER_DIM = 4, 4096, 256, 192
IMAGE_TOKEN = 3
WARM = 2
TEMPLATE = (TEMPLATES / "chatml.jinja").read_text()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and four special tokens before them."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    vocabulary = {token: n for n, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def make_model(directory: Path) -> None:
    """The LLaVA of transformers, and its tower and LM as our recipe names them."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=TOWER_DIM, intermediate_size=4 * TOWER_DIM, num_hidden_layers=6, num_attention_heads=3,
        image_size=384, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=LM_DIM, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=729,
        vision_feature_select_strategy="full", vision_feature_layer=-2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    tokenizer = make_tokenizer()
    model.save_pretrained(directory / "llava")
    model.model.vision_tower.save_pretrained(directory / "tower")
    lm: Any = model.model.language_model
    from transformers import LlamaForCausalLM

    causal = LlamaForCausalLM(text)
    causal.model.load_state_dict(lm.state_dict())
    causal.lm_head.load_state_dict(model.lm_head.state_dict())
    causal.save_pretrained(directory / "lm")
    tokenizer.save_pretrained(directory / "lm")
    torch.save(model.model.multi_modal_projector.state_dict(), directory / "projector.pt")


def make_rows(directory: Path, count: int, words: Callable[[random.Random], int], *, images: bool = True) -> None:
    """LLaVA JSON with answers of `words` words, and pictures of noise."""
    rng, pixels = random.Random(0), np.random.default_rng(0)
    (directory / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        if images:
            noise = pixels.integers(0, 255, (384, 384, 3), dtype=np.uint8)
            Image.fromarray(noise).save(directory / "images" / f"{number:04d}.jpg")
        answer = " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(words(rng)))
        asked = "<image>\nDescribe the image." if images else "Tell me something."
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "conversations": turns} | ({"image": f"{number:04d}.jpg"} if images else {}))
    (directory / "rows.json").write_text(json.dumps(rows))
