"""Exported, an assistant answers in transformers as it does here; imported again, it is the assistant it was."""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

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
    seal,
    sha256,
)
from basalt.cli import app
from basalt.data.preprocess import TEMPLATES
from basalt.model.assistant import LocalAssistant
from basalt.model.interchange import ADAPTED, InterchangeError, export_llava, import_llava, low_rank
from basalt.model.projector import Projector
from tests.tiny import IMAGE_SIZE, LM_DIM, TOKENS, TOWER_DIM, make_tower, picture
from tests.tiny_lm import IMAGE_TOKEN_ID, make_lm, make_tokenizer

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
IMAGE = Image.open(io.BytesIO(picture(3)))


@dataclass(frozen=True)
class Parts:
    """A tower, a base LM and an assistant of them."""

    tower: Path
    base_lm: Path
    assistant: Assistant


@pytest.fixture(scope="module")
def siglip_llama(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """With a LoRA."""
    root = tmp_path_factory.mktemp("siglip-llama")
    tower, base_lm = make_tower(root / "tower"), make_lm(root / "tiny-lm")
    return Parts(tower, base_lm, make(root / "cat", tower, base_lm, lora=True))


@pytest.fixture(scope="module")
def clip_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Without a LoRA, with a head that is not the embeddings."""
    root = tmp_path_factory.mktemp("clip-qwen2")
    torch.manual_seed(1)
    clip = CLIPVisionConfig(
        hidden_size=TOWER_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    CLIPVisionModel(clip).save_pretrained(root / "tower")
    tokenizer = make_tokenizer()
    qwen2 = Qwen2Config(
        hidden_size=LM_DIM,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    Qwen2ForCausalLM(qwen2).save_pretrained(root / "tiny-qwen2")
    tokenizer.save_pretrained(root / "tiny-qwen2")
    assistant = make(root / "cat", root / "tower", root / "tiny-qwen2", kind="clip", hidden=LM_DIM)
    return Parts(root / "tower", root / "tiny-qwen2", assistant)


def make(directory: Path, tower: Path, base_lm: Path, *, lora: bool = False, **differently: Any) -> Assistant:
    torch.manual_seed(2)
    directory.mkdir()
    options: Any = {"kind": "siglip", "fit": "resize", "hidden": 32} | differently
    projector = Projector(TOWER_DIM, options["hidden"], LM_DIM)
    projector.save(str(directory / "projector.safetensors"))
    shutil.copy(TEMPLATES / "chatml.jinja", directory / "chat_template.jinja")
    if lora:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(ADAPTED), init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base_lm), config).save_pretrained(directory / "lora")
        (directory / "lora" / "README.md").unlink()
    manifest = Manifest(
        name="cat",
        tower=TowerSpec(
            kind=options["kind"],
            id=str(tower),
            image_size=IMAGE_SIZE,
            tokens=TOKENS,
            width=TOWER_DIM,
            fit=options["fit"],
        ),
        projector=ProjectorSpec(
            file="projector.safetensors",
            digest=sha256((directory / "projector.safetensors").read_bytes()),
            hidden=options["hidden"],
        ),
        base_lm=BaseLMSpec(id=base_lm.name, lm_dim=LM_DIM, context=512, image_token_id=IMAGE_TOKEN_ID),
        lora=LoRASpec(dir="lora", digest=sha256((directory / "lora" / ADAPTER).read_bytes()), rank=4) if lora else None,
        chat_template="chat_template.jinja",
    )
    return seal(directory, manifest)


@torch.no_grad()
def our_logits(assistant: Assistant, base_lm: Path) -> Tensor:
    """`[T, vocab]` of the question about the picture."""
    local = LocalAssistant(assistant, base_lm)
    tower = local.model.tower
    assert tower is not None
    ids = torch.tensor([local.tokenizer.prompt(QUESTION)])
    return local.model(ids, torch.ones_like(ids), pixels=tower.preprocess(IMAGE)[None])[0][0]


@torch.no_grad()
def their_logits(checkpoint: Path) -> Tensor:
    """The same by transformers alone, its processor included."""
    processor: Any = AutoProcessor.from_pretrained(checkpoint)
    model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    return model(**processor(text=text, images=[IMAGE], return_tensors="pt")).logits[0]


@pytest.mark.parametrize("parts", ["siglip_llama", "clip_qwen2"])
def test_an_export_has_our_logits_and_is_imported_again(
    parts: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made: Parts = request.getfixturevalue(parts)
    ours = our_logits(made.assistant, made.base_lm)
    export_llava(made.assistant, made.base_lm, tmp_path / "llava", torch.float32)
    torch.testing.assert_close(their_logits(tmp_path / "llava"), ours, atol=1e-4, rtol=0)

    places: Any = {"fit": None, "base_lms": tmp_path / "base", "towers": tmp_path / "towers"}
    shared: Any = {"base_lm": made.base_lm, "tower": str(made.tower)}
    again = import_llava(tmp_path / "llava", "again", tmp_path / "models", **shared, **places).assistant
    spec = again.manifest
    assert (spec.tower, spec.base_lm) == (made.assistant.manifest.tower, made.assistant.manifest.base_lm)
    assert (spec.lora and spec.lora.rank) == (made.assistant.manifest.lora and 4)
    torch.testing.assert_close(our_logits(again, made.base_lm), ours, atol=1e-4, rtol=0)
    assert not (tmp_path / "base").exists() and not (tmp_path / "towers").exists()

    own = import_llava(tmp_path / "llava", "own", tmp_path / "models", base_lm=None, tower=None, **places)
    assert own.assistant.manifest.lora is None
    assert own.notes == [
        f"its tower is one of its own: {tmp_path}/towers/own",
        f"its LM is a base LM of its own: {tmp_path}/base/own",
    ]
    torch.testing.assert_close(our_logits(own.assistant, tmp_path / "base" / "own"), ours, atol=1e-4, rtol=0)


def test_padded_images_look_alike_to_the_exported_processor(siglip_llama: Parts, tmp_path: Path) -> None:
    """transformers pads before it resizes, we after: they part where the picture meets its border."""
    padding = make(tmp_path / "cat", siglip_llama.tower, siglip_llama.base_lm, fit="pad")
    export_llava(padding, siglip_llama.base_lm, tmp_path / "llava", torch.float32)
    tower = LocalAssistant(padding, siglip_llama.base_lm).model.tower
    assert tower is not None
    theirs = AutoProcessor.from_pretrained(tmp_path / "llava").image_processor
    flat = Image.new("RGB", (48, 32), "red")
    ours, pixels = tower.preprocess(flat), theirs(flat, return_tensors="pt")["pixel_values"][0]
    assert ours.shape == pixels.shape
    difference = (ours - pixels).abs()
    assert (difference > 0.02).float().mean() < 0.15


@pytest.fixture(scope="module")
def checkpoint(siglip_llama: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoint") / "llava"
    export_llava(siglip_llama.assistant, siglip_llama.base_lm, target, torch.float32)
    return target


def imported(checkpoint: Path, tmp_path: Path, **shared: Any) -> Assistant:
    options: Any = {"base_lm": None, "tower": None, "fit": None} | shared
    return import_llava(
        checkpoint, "again", tmp_path / "models", base_lms=tmp_path / "base", towers=tmp_path / "towers", **options
    ).assistant


def changed(checkpoint: Path, tmp_path: Path, change: Any) -> Path:
    """A checkpoint whose model was changed."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    with torch.no_grad():
        change(model)
    model.save_pretrained(tmp_path / "changed")
    for file in checkpoint.iterdir():
        if not (tmp_path / "changed" / file.name).exists():
            shutil.copy(file, tmp_path / "changed")
    return tmp_path / "changed"


def test_what_is_shared_must_be_what_it_was_made_of(siglip_llama: Parts, checkpoint: Path, tmp_path: Path) -> None:
    base_lm = siglip_llama.base_lm
    with pytest.raises(InterchangeError, match=r"its tower is not .*/other: \d+ weights differ"):
        imported(checkpoint, tmp_path, tower=str(make_tower(tmp_path / "other", seed=9)), base_lm=base_lm)
    with pytest.raises(InterchangeError, match=r"embed_tokens\.weight differs"):
        imported(checkpoint, tmp_path, base_lm=make_lm(tmp_path / "other-lm", seed=9))
    trained = changed(
        checkpoint, tmp_path, lambda model: model.model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
    )
    with pytest.raises(InterchangeError, match=r"layers\.0\.mlp\.up_proj\.weight differs by more than a low rank"):
        imported(trained, tmp_path, base_lm=base_lm)
    rounded = changed(checkpoint, tmp_path, lambda model: model.bfloat16())
    with pytest.raises(InterchangeError, match="merging in 16 bits"):
        imported(rounded, tmp_path, base_lm=base_lm)
    assert not any((tmp_path / place / "again").exists() for place in ("models", "base", "towers"))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("vision_feature_layer", -1, "its vision_feature_layer is -1; with a siglip tower only -2 is served"),
        ("projector_hidden_act", "relu", "its projector_hidden_act is 'relu'"),
        ("model_type", "llava_next", "of type 'llava_next': a 'llava' can be imported"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    checkpoint: Path, tmp_path: Path, field: str, value: object, told: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text()) | {field: value}
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InterchangeError, match=told):
        imported(tmp_path / "llava", tmp_path)


def test_an_image_processor_that_crops_needs_a_choice(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "llava")
    processor: Any = AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor.size = {"shortest_edge": IMAGE_SIZE}
    processor.save_pretrained(tmp_path / "llava")
    with pytest.raises(InterchangeError, match="crops images"):
        imported(tmp_path / "llava", tmp_path)
    assert imported(tmp_path / "llava", tmp_path, fit="pad").manifest.tower.fit == "pad"


def test_what_llava_has_no_place_for_is_not_exported(siglip_llama: Parts, tmp_path: Path) -> None:
    ours = load_assistant(Path(__file__).parents[2] / "models" / "basalt-tiny")
    with pytest.raises(InterchangeError, match="its tower is efficientnet-lite2, and Llava takes SigLIP and CLIP"):
        export_llava(ours, siglip_llama.base_lm, tmp_path / "llava", torch.float32)
    wide = make(tmp_path / "wide", siglip_llama.tower, siglip_llama.base_lm, hidden=LM_DIM + 1)
    with pytest.raises(InterchangeError, match="its projector has 65 hidden channels"):
        export_llava(wide, siglip_llama.base_lm, tmp_path / "llava", torch.float32)
    narrow = make_lm(tmp_path / "narrow")
    spec = siglip_llama.assistant.manifest
    other = spec.model_copy(update={"base_lm": spec.base_lm.model_copy(update={"lm_dim": 32})})
    with pytest.raises(AssistantError, match=r"made for tiny-lm of width 32, .*narrow has width 64"):
        export_llava(
            Assistant(siglip_llama.assistant.directory, other, "sha256:"), narrow, tmp_path / "llava", torch.float32
        )
    with pytest.raises(InterchangeError, match="is there already"):
        export_llava(siglip_llama.assistant, siglip_llama.base_lm, tmp_path, torch.float32)
    assert not (tmp_path / "llava").exists()


def test_the_commands(siglip_llama: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASALT_STORE", str(tmp_path / "objects"))
    monkeypatch.setenv("BASALT_DATABASE", f"sqlite:///{tmp_path}/basalt.db")
    monkeypatch.chdir(tmp_path)

    def basalt(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["models", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    reference = basalt("publish", siglip_llama.assistant.directory)
    assert basalt("export", reference, "llava", "--base-lm", siglip_llama.base_lm) == "llava"
    shared = ["--base-lm", siglip_llama.base_lm, "--tower", siglip_llama.tower]
    again = basalt("import", "llava", "--name", "again", *shared)
    assert basalt("list") == f"{again}\t-\tregistry, models\n{reference}\t-\tregistry"
    lineage = json.loads(basalt("show", "again"))["manifest"]["lineage"]
    assert lineage["imported"]["base_lm"] == "its LM is tiny-lm with a LoRA of rank 4"


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_a_low_rank_difference_is_found_with_its_rank(rank: int) -> None:
    torch.manual_seed(rank)
    weight, difference = torch.randn(96, 64), 0.01 * torch.randn(96, rank) @ torch.randn(rank, 64)
    found = low_rank((weight + difference) - weight)
    assert found is not None
    a, b = found
    assert a.shape == (rank, 64) and b.shape == (96, rank)
    torch.testing.assert_close(b @ a, difference, atol=1e-4, rtol=0)


def test_a_difference_of_high_rank_is_none() -> None:
    assert low_rank(torch.randn(96, 64, generator=torch.Generator().manual_seed(0))) is None
