"""Assistants to and from Hugging Face's `LlavaForConditionalGeneration`.

An export gives the logits that we give: the LoRA is merged into the base LM in float32, tower and projector go over as
they are. An import takes the projector, and tells the LM and tower apart: what is the base LM or tower that was named
is shared with other assistants, a low-rank difference from the base LM becomes a LoRA, and what was not named is
written as a base LM or tower of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
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
    ADAPTER,
    Assistant,
    AssistantError,
    BaseLMSpec,
    LoRASpec,
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

Kind = Literal["siglip", "clip"]
KINDS: dict[str, Kind] = {"siglip_vision_model": "siglip", "clip_vision_model": "clip"}
# Of choosing features: CLIP's class token is left out.
STRATEGY: dict[str, Literal["full", "default"]] = {"siglip": "full", "clip": "default"}
CLASSES = {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}
PIXELS = {"siglip": SIGLIP, "clip": CLIP}
LM_TYPES = ("llama", "qwen2")
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # what a LoRA may change
MAX_RANK = 256
EXACT = 1e-3  # of a difference's norm, what its LoRA may leave out
PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Are you sure?"},
]


class InterchangeError(AssistantError):
    """What is to be exported or imported has no counterpart on the other side; the message says which part."""


@dataclass(frozen=True)
class Imported:
    """An assistant made of a checkpoint; `notes` say what became of its tower and LM."""

    assistant: Assistant
    notes: list[str]


def export_llava(assistant: Assistant, base_lm: str | Path, target: Path, dtype: torch.dtype) -> None:
    """Writes `target`: weights, configs, tokenizer, chat template and image processor.

    Args:
        base_lm: the Hugging Face directory or id of the base LM.

    Raises:
        InterchangeError: Llava has no place for this tower, projector or template, or `target` is there already.
        AssistantError: the base LM is not the one the assistant was made for.
    """
    spec = assistant.manifest
    if spec.tower.kind == "efficientnet-lite":
        raise InterchangeError(
            f"{spec.name} cannot be exported: its tower is {spec.tower.id}, and Llava takes SigLIP and CLIP towers "
            "only. Its projector and LoRA are plain safetensors and peft files; train with a SigLIP or CLIP tower to "
            "export a whole model"
        )
    if target.exists():
        raise InterchangeError(f"{target} is there already: name a directory to be made")
    tower: Any = load_vision_encoder(spec.tower).backbone
    processor = _processor(assistant, AutoTokenizer.from_pretrained(base_lm), tower.config.patch_size)
    lm = load_lm(assistant, base_lm, torch.float32)  # merged in bf16, a LoRA's small changes would be lost
    if spec.lora is not None:
        lm = lm.merge_and_unload(safe_merge=True)
    model = _llava(spec, tower, load_projector(assistant), lm)
    with replacing(target) as directory:
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
        base_lm: the directory of the base LM that it shares, with a LoRA or without; without one, its LM is written
            to `base_lms/name`.
        tower: the tower that it shares, a transformers model id or directory; without one, it goes to `towers/name`.
        fit: how images become the tower's square; needed where the checkpoint's processor crops them, as ours do not.

    Raises:
        InterchangeError: something of the checkpoint has no counterpart here, or differs from what it is to share.
    """
    if not (source / "config.json").is_file():
        raise InterchangeError(f"{source} holds no config.json: give the directory of a Hugging Face checkpoint")
    config: Any = AutoConfig.from_pretrained(source)
    kind = _check_config(config)
    vision, text = config.vision_config, config.text_config
    processor: Any = AutoProcessor.from_pretrained(source)
    tokens = (vision.image_size // vision.patch_size) ** 2
    template = _our_template(processor, config.image_token_id, tokens)
    fit = _fit(processor.image_processor, kind, vision.image_size, fit)
    model: Any = LlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    parts = model.model
    with replacing(models / name) as directory:
        projector = Projector(vision.hidden_size, text.hidden_size, text.hidden_size)
        projector.take(parts.multi_modal_projector.state_dict(), str(source))
        projector.save(str(directory / "projector.safetensors"))
        (directory / "chat_template.jinja").write_text(template)
        lora, lm_note = None, f"its LM is a base LM of its own: {base_lms / name}"
        if base_lm is not None:
            lora = _difference(_lm(model), base_lm, directory / "lora")
            lm_note = f"its LM is {base_lm.name}" + (f" with a LoRA of rank {lora.rank}" if lora else "")
        tower_note = f"its tower is {tower}" if tower else f"its tower is one of its own: {towers / name}"
        if tower is not None:
            _check_tower(parts.vision_tower, kind, tower)
        manifest = Manifest(
            name=name,
            tower=TowerSpec(
                kind=kind,
                id=tower or str(towers / name),
                image_size=vision.image_size,
                tokens=tokens,
                width=vision.hidden_size,
                fit=fit,
            ),
            projector=ProjectorSpec(
                file="projector.safetensors",
                digest=sha256((directory / "projector.safetensors").read_bytes()),
                hidden=text.hidden_size,
            ),
            base_lm=BaseLMSpec(
                id=base_lm.name if base_lm else name,
                lm_dim=text.hidden_size,
                context=text.max_position_embeddings,
                image_token_id=config.image_token_id,
            ),
            lora=lora,
            chat_template="chat_template.jinja",
            lineage={"imported": {"from": source.resolve().name, "tower": tower_note, "base_lm": lm_note}},
        )
        seal(directory, manifest)
        if tower is None:
            with replacing(towers / name) as own:
                parts.vision_tower.save_pretrained(own)
        if base_lm is None:
            with replacing(base_lms / name) as own:
                _lm(model).save_pretrained(own)
                processor.tokenizer.save_pretrained(own)
    return Imported(load_assistant(models / name), [tower_note, lm_note])


# Out


def _llava(spec: Manifest, tower: Any, projector: Projector, lm: Any) -> Any:
    """The parts, put together as a `LlavaForConditionalGeneration`."""
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=lm.config,
        image_token_index=spec.base_lm.image_token_id,
        image_seq_length=spec.tower.tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy=STRATEGY[spec.tower.kind],
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector.load_state_dict(_widened(spec, projector), assign=True)
    model.model.language_model = lm.model
    model.lm_head = lm.lm_head
    model.generation_config = lm.generation_config
    return model.eval()


def _widened(spec: Manifest, projector: Projector) -> dict[str, Tensor]:
    """The weights with as many hidden channels as the LM is wide, as Llava has it: what is added is zero, and so is
    its GELU."""
    more = spec.base_lm.lm_dim - spec.projector.hidden
    if more < 0:
        raise InterchangeError(
            f"{spec.name} cannot be exported: its projector has {spec.projector.hidden} hidden channels, and Llava has "
            f"as many as the base LM is wide, {spec.base_lm.lm_dim}; train with `projector_hidden` of at most that"
        )
    weights = projector.state_dict()
    return {
        "linear_1.weight": pad(weights["linear_1.weight"], (0, 0, 0, more)),
        "linear_1.bias": pad(weights["linear_1.bias"], (0, more)),
        "linear_2.weight": pad(weights["linear_2.weight"], (0, more)),
        "linear_2.bias": weights["linear_2.bias"],
    }


def _processor(assistant: Assistant, tokenizer: PreTrainedTokenizerFast, patch_size: int) -> LlavaProcessor:
    """Tokenizer, image processor and a chat template that writes the image token itself.

    Raises:
        InterchangeError: it would not give the token ids that we give.
    """
    spec = assistant.manifest
    template = assistant.path(spec.chat_template).read_text()
    image_token = str(tokenizer.convert_ids_to_tokens(spec.base_lm.image_token_id))
    theirs = template.replace(PLACEHOLDER, image_token)
    tokenizer.chat_template = theirs
    processor = LlavaProcessor(
        _image_processor(spec.tower),
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=STRATEGY[spec.tower.kind],
        chat_template=theirs,
        image_token=image_token,
        num_additional_image_tokens=1 if spec.tower.kind == "clip" else 0,
    )
    ours = Tokenizer(tokenizer, template, spec.base_lm.image_token_id, spec.tower.tokens).prompt(PROBE)
    if _prompt(processor) != ours:
        raise InterchangeError(
            f"{spec.name} cannot be exported: with {image_token!r} (token {spec.base_lm.image_token_id}) for an image, "
            "transformers' processor does not give the token ids that training gave; an image token that is special "
            "in the base LM's tokenizer would do"
        )
    return processor


def _image_processor(spec: TowerSpec) -> Any:
    size, (mean, std) = spec.image_size, PIXELS[spec.kind]
    square = {"height": size, "width": size}
    if spec.fit == "resize":
        return SiglipImageProcessorPil(size=square, image_mean=list(mean), image_std=list(std))
    return LlavaImageProcessorPil(
        do_pad=True, size=square, do_center_crop=False, crop_size=square, image_mean=list(mean), image_std=list(std)
    )


def _prompt(processor: Any) -> list[int]:
    """Token ids of the probe as transformers' processor gives them."""
    text = processor.apply_chat_template(PROBE, add_generation_prompt=True, tokenize=False)
    bos = processor.tokenizer.bos_token
    twice = bos is not None and text.startswith(bos)
    return processor(text=text, images=[Image.new("RGB", (8, 8))], add_special_tokens=not twice)["input_ids"][0]


# In


def _check_config(config: Any) -> Kind:
    """The kind of the tower."""
    if config.model_type != "llava":
        raise InterchangeError(f"the checkpoint is of type {config.model_type!r}: a 'llava' can be imported")
    kind = KINDS.get(config.vision_config.model_type)
    if kind is None:
        raise InterchangeError(f"its tower is a {config.vision_config.model_type}: {' and '.join(KINDS)} are served")
    if config.text_config.model_type not in LM_TYPES:
        raise InterchangeError(
            f"its LM is of type {config.text_config.model_type}: {' and '.join(LM_TYPES)} are served"
        )
    wanted = {
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": STRATEGY[kind],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }
    for field, value in wanted.items():
        if (found := getattr(config, field)) != value:
            raise InterchangeError(f"its {field} is {found!r}; with a {kind} tower only {value!r} is served")
    return kind


def _our_template(processor: Any, image_token_id: int, tokens: int) -> str:
    """The checkpoint's chat template with our placeholder, and with the beginning token where its tokenizer adds it."""
    if not isinstance(processor.chat_template, str):
        raise InterchangeError("it holds no chat template: add its chat_template.jinja")
    template = processor.chat_template.replace(processor.image_token, PLACEHOLDER)
    theirs = _prompt(processor)
    for ours in (template, "{{- bos_token -}}" + template):
        tokenizer = Tokenizer(processor.tokenizer, ours, image_token_id, tokens)
        if tokenizer.prompt(PROBE) == theirs:
            return ours
    raise InterchangeError("its processor gives other token ids than our tokenizing of its chat template")


def _fit(processor: Any, kind: Kind, size: int, wanted: Literal["resize", "pad"] | None) -> Literal["resize", "pad"]:
    mean, std = PIXELS[kind]
    found = (tuple(processor.image_mean), tuple(processor.image_std))
    if not torch.allclose(torch.tensor(found), torch.tensor((mean, std)), atol=1e-4):
        raise InterchangeError(f"its pixels are normalised by {found}; a {kind} tower's are by {(mean, std)}")
    if wanted is not None:
        return wanted
    if getattr(processor, "do_pad", False):
        return "pad"
    square = (processor.size.height, processor.size.width) == (size, size)
    if square and not getattr(processor, "do_center_crop", False):
        return "resize"
    raise InterchangeError("its processor crops images, as ours do not: choose `--fit pad` or `--fit resize`")


def _lm(model: Any) -> Any:
    """The checkpoint's LM, as a causal LM of its own."""
    with torch.device("meta"):
        lm: Any = AutoModelForCausalLM.from_config(model.config.text_config)
    lm.model, lm.lm_head = model.model.language_model, model.lm_head
    return lm


def _check_tower(tower: nn.Module, kind: Kind, named: str) -> None:
    differing = _differing(tower.state_dict(), CLASSES[kind].from_pretrained(named).state_dict())
    if differing:
        raise InterchangeError(
            f"its tower is not {named}: {len(differing)} weights differ, {differing[0]} the first; name the right one, "
            "or none, and it becomes a tower of its own"
        )


def _difference(lm: Any, base_lm: Path, target: Path) -> LoRASpec | None:
    """Writes what the LM has over the base LM as a LoRA to `target`; None where it is the base LM itself.

    Raises:
        InterchangeError: it is no LoRA.
    """
    base: Any = AutoModelForCausalLM.from_pretrained(base_lm, dtype="auto")
    weights, named = lm.state_dict(), base.state_dict()
    differing = _differing(weights, named)
    if not differing:
        return None
    advice = "name the right one, or none, and it becomes a base LM of its own"
    for name in differing:
        if name not in named or named[name].shape != weights[name].shape or _leaf(name) not in ADAPTED:
            shapes = [tuple(value[name].shape) if name in value else None for value in (weights, named)]
            raise InterchangeError(
                f"its LM is not {base_lm} with a LoRA: {name} differs ({shapes[0]}, there {shapes[1]}); {advice}"
            )
    adapted = sorted({_leaf(name) for name in differing})
    factors = {}
    for name in (name for name in weights if name.endswith(".weight") and _leaf(name) in adapted):
        found = low_rank(weights[name].float() - named[name].float())
        if found is None:
            raise InterchangeError(
                f"its LM is not {base_lm} with a LoRA: {name} differs by more than a low rank, as after training all "
                f"weights or merging in 16 bits; {advice}"
            )
        factors[name.removesuffix(".weight")] = found
    rank = max(len(a) for a, _ in factors.values())
    target.mkdir()
    LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted, task_type="CAUSAL_LM").save_pretrained(str(target))
    tensors = {}
    for name, (a, b) in factors.items():
        more = rank - len(a)
        tensors[f"base_model.model.{name}.lora_A.weight"] = pad(a, (0, 0, 0, more)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pad(b, (0, more)).contiguous()
    save_file(tensors, target / ADAPTER)
    return LoRASpec(dir=target.name, digest=sha256((target / ADAPTER).read_bytes()), rank=rank)


def low_rank(difference: Tensor) -> tuple[Tensor, Tensor] | None:
    """A `[rank, in]` and B `[out, rank]` with B·A the difference `[out, in]`, all but `EXACT` of its norm; of the
    smallest rank that does. None where that is over `MAX_RANK`, or no smaller than the difference itself."""
    out, in_ = difference.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(difference, q=max(min(MAX_RANK, out * in_ // (out + in_)), 1), niter=4)
    beyond = (difference - (u * s) @ v.T).double().square().sum()
    tail = s.double().square().flip(0).cumsum(0).flip(0)  # tail[r]: what the singular values from r on hold
    missing = torch.cat([tail, tail.new_zeros(1)]) + beyond
    enough = (missing <= (EXACT * difference.double().norm()) ** 2).nonzero()
    if not len(enough):
        return None
    rank = int(enough[0])
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).T, u[:, :rank] * root


def _differing(weights: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> list[str]:
    """The names of those that are not the same there, in the precision they have here."""
    return [
        name
        for name, value in weights.items()
        if name not in named or named[name].shape != value.shape or not torch.equal(named[name].to(value.dtype), value)
    ]


def _leaf(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` → `up_proj`; of a bias nothing, as a LoRA has none."""
    return name.split(".")[-2] if name.endswith(".weight") else ""
