"""Tiny real assistants: a SigLIP tower of random weights, shared, and a projector each."""

import io
import random
from pathlib import Path

import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from basalt.assistants import BaseLMSpec, Manifest, ProjectorSpec, TowerSpec, seal, sha256
from basalt.model.projector import Projector

IMAGE_SIZE = 32
TOKENS = 16  # (32 / 8)²
TOWER_DIM = 24
LM_DIM = 64


def make_tower(directory: Path, seed: int = 0) -> Path:
    """A `transformers` directory of a small SigLIP vision model."""
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=TOWER_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        vision_use_head=False,
    )
    SiglipVisionModel(config).save_pretrained(directory)
    return directory


def make_assistant(models: Path, name: str, tower: Path, *, seed: int = 0, lm_dim: int = LM_DIM) -> Path:
    """`models/NAME` with a manifest and a random projector."""
    torch.manual_seed(seed)
    directory = models / name
    directory.mkdir(parents=True)
    Projector(TOWER_DIM, 32, lm_dim).save(str(directory / "projector.safetensors"))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    seal(
        directory,
        Manifest(
            name=name,
            tower=TowerSpec(
                kind="siglip", id=str(tower), image_size=IMAGE_SIZE, tokens=TOKENS, width=TOWER_DIM, fit="resize"
            ),
            projector=ProjectorSpec(
                file="projector.safetensors",
                digest=sha256((directory / "projector.safetensors").read_bytes()),
                hidden=32,
            ),
            base_lm=BaseLMSpec(id="tiny", lm_dim=lm_dim, context=512, image_token_id=16),
            chat_template="chat_template.jinja",
        ),
    )
    return directory


def picture(seed: int = 0, size: tuple[int, int] = (48, 40), format: str = "PNG") -> bytes:
    """The bytes of an image file, different for each seed."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).save(buffer, format)
    return buffer.getvalue()
