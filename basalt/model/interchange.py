"""Assistants to and from Hugging Face's `LlavaForConditionalGeneration`.

An export gives the logits that we give: the LoRA is merged into the base LM in float32 and all is written in the dtype
asked for; tower and projector go over as they are. An import makes an assistant again. What of a checkpoint is the
tower or base LM that was named is shared with other assistants; what differs from it becomes the assistant's own.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from basalt.assistants import (
    Assistant,
    AssistantError,
    BaseLMSpec,
    Manifest,
    ProjectorSpec,
    TowerSpec,
    load_assistant,
    replacing,
    seal,
    sha256,
)
from basalt.data.preprocess import Tokenizer
from basalt.data.readers import PLACEHOLDER
from basalt.model.assistant import load_lm
from basalt.model.projector import Projector, load_projector
from basalt.model.vision_encoder import CLIP, FEATURE_LAYER, SIGLIP, load_vision_encoder

STRATEGY = {"siglip": "full", "clip": "default"}  # of choosing features: CLIP's class token is left out
TOWER_KINDS = {"siglip_vision_model": "siglip", "clip_vision_model": "clip"}
LM_TYPES = ("llama", "qwen2")
PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


class InterchangeError(AssistantError):
    """What is to be exported or imported has no counterpart on the other side; the message says which part."""


@dataclass(frozen=True)
class Imported:
    """An assistant made of a checkpoint; `notes` say where its tower and base LM are."""

    assistant: Assistant
    notes: list[str]


def export_llava(assistant: Assistant, base_lm: str | Path, target: Path, dtype: torch.dtype) -> None:
    """Writes `target`: weights, config, generation config, tokenizer, chat template and image processor.

    Args:
        base_lm: the Hugging Face directory or id of the base LM.

    Raises:
        InterchangeError: Llava has no place for this tower or projector, or `target` is there already.
        AssistantError: the base LM is not the one the assistant was made for.
    """
    spec = assistant.manifest
    if spec.tower.kind == "efficientnet-lite":
        raise InterchangeError(
            f"{spec.name} cannot be exported: its tower is {spec.tower.id}, and Llava takes SigLIP and CLIP towers only. "
            f"Its projector ({spec.projector.file}) and LoRA ({spec.lora.dir if spec.lora else 'none'}) are plain "
            "safetensors and peft files; train with a SigLIP or CLIP tower to export a whole model"
        )
    if target.exists():
        raise InterchangeError(f"{target} is there already: name a directory to be made")
    tower = load_vision_encoder(spec.tower).backbone
    lm = load_lm(assistant, base_lm, torch.float32)  # merged in bf16, a LoRA's small changes would be lost
    if spec.lora is not None:
        lm = lm.merge_and_unload(safe_merge=True)
    tokenizer = _with_placeholder(AutoTokenizer.from_pretrained(base_lm), spec.base_lm.image_token_id)
    template = assistant.path(spec.chat_template).read_text()
    processor = _processor(spec.tower, tower.config.patch_size, tokenizer, template)
    _check_prompt(processor, Tokenizer(tokenizer, template, spec.base_lm.image_token_id, spec.tower.tokens))
    model = _llava(spec, tower, load_projector(assistant), lm)
    with _whole(target) as directory:
        model.to(dtype).save_pretrained(directory)
        processor.save_pretrained(directory)


def import_llava(
    source: Path,
    name: str,
    models: Path,
    *,
    base_lm: Path | None,
    tower: str | None,
    fit: Literal["resize", "pad"] | None,
    base_lms: Path,
    towers: Path,
) -> Imported:
    """Makes `models/name` of a checkpoint's directory.

    Args:
        base_lm: the directory of the base LM it may share; where the checkpoint's differs, or without one, its LM is
            written to a directory of its own under `base_lms`.
        tower: the same of the tower, a transformers model id or directory, and `towers`.
        fit: how images become the tower's square; needed where the checkpoint's processor crops them, as ours do not.

    Raises:
        InterchangeError: something of the checkpoint has no counterpart here.
    """
    if not (source / "config.json").is_file():
        raise InterchangeError(f"{source} holds no config.json: give the directory of a Hugging Face checkpoint")
    config = AutoConfig.from_pretrained(source)
    kind = _check_config(config)
    processor = AutoProcessor.from_pretrained(source)
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    template = _our_template(processor)
    parts, vision, text = model.model, config.vision_config, config.text_config
    tower_id, tower_note = _shared_or_own(
        "tower", parts.vision_tower, _load_tower(kind, tower), tower, towers / name
    )
    lm_id, lm_note = _shared_or_own("base LM", _lm(model), _load_lm(base_lm), base_lm, base_lms / name, processor)
    with replacing(models / name) as directory:
        projector = Projector(vision.hidden_size, text.hidden_size, text.hidden_size)
        projector.take(parts.multi_modal_projector.state_dict(), str(source))
        projector.to(parts.multi_modal_projector.linear_1.weight.dtype).save(str(directory / "projector.safetensors"))
        (directory / "chat_template.jinja").write_text(template)
        manifest = Manifest(
            name=name,
            tower=TowerSpec(
                kind=kind,
                id=tower_id,
                image_size=vision.image_size,
                tokens=(vision.image_size // vision.patch_size) ** 2,
                width=vision.hidden_size,
                fit=_fit(processor.image_processor, kind, vision.image_size, fit),
            ),
            projector=ProjectorSpec(
                file="projector.safetensors",
                digest=sha256((directory / "projector.safetensors").read_bytes()),
                hidden=text.hidden_size,
            ),
            base_lm=BaseLMSpec(
                id=lm_id,
                lm_dim=text.hidden_size,
                context=text.max_position_embeddings,
                image_token_id=config.image_token_index,
            ),
            chat_template="chat_template.jinja",
            lineage={"imported": {"from": source.resolve().name, "tower": tower_note, "base_lm": lm_note}},
        )
        seal(directory, manifest)
    return Imported(load_assistant(models / name), [tower_note, lm_note])
