"""Our composition equals transformers' Llava on the same weights, and packing equals running alone."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from basalt.assistants import TowerSpec
from basalt.data.grouping import fill_rows, group_samples
from basalt.data.packing import pack
from basalt.data.preprocess import IGNORE, Sample
from basalt.model.last_layer import train_by_segments
from basalt.model.multimodal_llama import MultimodalLlama
from basalt.model.projector import Projector
from basalt.model.vision_encoder import transformer_encoder

IMAGE = 7
VOCABULARY = 64
LMS = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}


def siglip(size: int = 32, patch: int = 8, width: int = 32, layers: int = 3) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        image_size=size, patch_size=patch, vision_use_head=False,
    )  # fmt: skip


def clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )


def llama(width: int = 48, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=4096,
    )  # fmt: skip


def qwen2() -> Qwen2Config:
    return Qwen2Config(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )  # fmt: skip


def qwen3() -> Qwen3Config:
    """A layer of another make: queries and keys are normalised."""
    return Qwen3Config(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, vocab_size=VOCABULARY,
    )  # fmt: skip


def twins(vision, text) -> tuple[LlavaForConditionalGeneration, MultimodalLlama]:
    """transformers' model and ours over the very same weights."""
    torch.manual_seed(0)
    kind = "clip" if isinstance(vision, CLIPVisionConfig) else "siglip"
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="default" if kind == "clip" else "full",
    )  # fmt: skip
    theirs = LlavaForConditionalGeneration(config).eval()
    tokens = (vision.image_size // vision.patch_size) ** 2
    spec = TowerSpec(
        kind=kind, id="test", image_size=vision.image_size, tokens=tokens, width=vision.hidden_size, fit="resize"
    )
    projector = Projector(vision.hidden_size, text.hidden_size, text.hidden_size)
    projector.load_state_dict(theirs.model.multi_modal_projector.state_dict())
    lm = LMS[text.model_type](text).eval()
    lm.model.load_state_dict(theirs.model.language_model.state_dict())
    lm.lm_head.load_state_dict(theirs.lm_head.state_dict())
    return theirs, MultimodalLlama(transformer_encoder(spec, theirs.model.vision_tower), projector, lm, IMAGE)


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


ROWS = [  # none, one and two images in one batch; 16 visual tokens each
    [11, 12, 13, 14],
    [11, *[IMAGE] * 16, 20, 21],
    [*[IMAGE] * 16, 30, *[IMAGE] * 16, 31, 32, 33],
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("vision", "text"), [(siglip(), llama()), (clip(), llama()), (siglip(), qwen2())])
@torch.no_grad()
def test_logits_equal_transformers_llava(vision, text, side: str) -> None:
    theirs, ours = twins(vision, text)
    ids, mask = padded(ROWS, side)
    pixels = torch.randn(3, 3, 32, 32)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels, position_ids=positions).logits
    logits, _ = ours(ids, mask, pixels=pixels)
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_logits_equal_at_the_true_widths() -> None:
    """SigLIP-SO400M's 729 tokens of 1152 into a 4096-wide LM; few layers, so that it fits a small machine."""
    vision = siglip(size=384, patch=14, width=1152, layers=2)
    theirs, ours = twins(vision, llama(width=4096, layers=1))
    ids, mask = padded([[11, *[IMAGE] * 729, 20, 21]], "right")
    pixels = torch.randn(1, 3, 384, 384)
    logits, _ = ours(ids, mask, pixels=pixels)
    expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_text_only_batch_needs_no_image() -> None:
    _, ours = twins(siglip(), llama())
    ids, mask = padded([[11, 12], [13, 14, 15]], "right")
    logits, _ = ours(ids, mask)
    torch.testing.assert_close(logits[mask.bool()], ours.lm(input_ids=ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("count", [15, 17, 32])
def test_wrong_number_of_image_tokens_is_refused(count: int) -> None:
    _, ours = twins(siglip(), llama())
    ids, mask = padded([[11, *[IMAGE] * count, 20]], "right")
    with pytest.raises(ValueError, match=f"{count} image tokens, the images give 16"):
        ours(ids, mask, pixels=torch.randn(1, 3, 32, 32))


def test_loss_equals_transformers_with_labels_on_both_padding_sides() -> None:
    theirs, ours = twins(siglip(), llama())
    for side in ("left", "right"):
        ids, mask = padded(ROWS, side)
        labels = torch.where((ids == IMAGE) | ~mask.bool(), torch.full_like(ids, IGNORE), ids)
        pixels = torch.randn(3, 3, 32, 32)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = theirs(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels, position_ids=positions
        ).loss
        _, loss = ours(ids, mask, pixels=pixels, labels=labels)
        assert loss is not None
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def conversations() -> list[tuple[tuple[str, ...], Sample]]:
    """Five about image a (three with the same question), two about b, one about both, two of text only."""
    image = [11, *[IMAGE] * 16]

    def sample(question: list[int], answer: list[int]) -> Sample:
        return Sample(question + answer, [IGNORE] * len(question) + answer)

    return [
        (("a",), sample([*image, 20, 21], [40, 2])),
        (("a",), sample([*image, 20, 21], [41, 42, 2])),
        (("b",), sample([*image, 22], [43, 44, 2])),
        ((), sample([11, 23, 24], [45, 46, 2])),
        (("a",), sample([*image, 20, 21], [40, 47, 2])),
        (("a",), sample([*image, 25, 26, 27], [48, 2])),
        (("b",), sample([*image, 28], [49, 2])),
        (("b", "a"), sample([*image, 29, *image, 30], [51, 2])),
        ((), sample([11], [50, 2])),
    ]


def packed_and_alone(attention: str, lm: PreTrainedConfig):
    _, ours = twins(siglip(), lm)
    if attention == "segments":
        train_by_segments(ours.lm)
    else:
        ours.lm.set_attn_implementation(attention)
    pixels = {"a": torch.randn(3, 32, 32), "b": torch.randn(3, 32, 32)}
    total = torch.zeros(())
    for images, sample in conversations():
        ids, labels = torch.tensor([sample.ids]), torch.tensor([sample.labels])
        shown = torch.stack([pixels[image] for image in images]) if images else None
        _, loss = ours(ids, torch.ones_like(ids), pixels=shown, labels=labels)
        total = total + loss * sum(label != IGNORE for label in sample.labels)
    groups = group_samples(conversations(), 96, IMAGE)
    assert sum(map(len, groups)) < sum(len(sample.ids) for _, sample in conversations()) - 2 * 16
    batch = pack(fill_rows(groups, 96, random.Random(0)), 96, pad_id=0, image_token_id=IMAGE)
    assert ours.tower is not None
    features = ours.tower(torch.stack([pixels[name] for name in batch.images]))
    return ours, total, ours.packed_loss(batch, features)


ways_to_pack = pytest.mark.parametrize(
    ("attention", "lm"),
    [("eager", llama()), ("sdpa", llama()), ("segments", llama()), ("segments", qwen2()), ("segments", qwen3())],
)


@ways_to_pack
def test_packed_loss_equals_each_conversation_alone(attention: str, lm: PreTrainedConfig) -> None:
    _, alone, packed = packed_and_alone(attention, lm)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@ways_to_pack
def test_packed_gradients_equal_each_conversation_alone(attention: str, lm: PreTrainedConfig) -> None:
    ours, alone, packed = packed_and_alone(attention, lm)
    weight = ours.projector.linear_1.weight
    expected = torch.autograd.grad(alone, weight)[0]
    torch.testing.assert_close(torch.autograd.grad(packed, weight)[0], expected, atol=1e-5, rtol=1e-4)


@ways_to_pack
def test_a_pass_with_nothing_in_it_has_no_loss(attention: str, lm: PreTrainedConfig) -> None:
    _, ours = twins(siglip(), lm)
    ours.lm.requires_grad_(False)
    if attention == "segments":
        train_by_segments(ours.lm)
    else:
        ours.lm.set_attn_implementation(attention)
    empty = pack([[], []], 32, pad_id=0, image_token_id=IMAGE)
    passed: list[int] = []
    for number, layer in enumerate(ours.lm.model.layers):
        layer.register_full_backward_pre_hook(lambda *_, number=number: passed.append(number))
    text = pack([group_samples([((), Sample([11, 23, 24], [IGNORE, 23, 24]))], 32, IMAGE)], 32, 0, IMAGE)
    for batch in (empty, text):
        loss = ours.packed_loss(batch, None)
        assert (loss == 0) == (batch is empty)
        loss.backward()
    assert passed == [1, 0, 1, 0]
    assert all(parameter.grad is None for parameter in ours.parameters())


class NeverAsked(TorchDispatchMode):
    """Refuses to tell a tensor's value, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_a_pass_of_training_waits_for_no_device() -> None:
    _, ours = twins(siglip(), llama())
    train_by_segments(ours.lm)
    groups = group_samples(conversations(), 96, IMAGE)
    rows = fill_rows(groups, 96, random.Random(0))
    counted, not_counted = pack(rows, 96, 0, IMAGE), pack(rows, 96, 0)
    features = torch.randn(len(counted.images), 16, 32)
    with NeverAsked():
        ours.packed_loss(counted, features).backward()
    with NeverAsked(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        ours.packed_loss(not_counted, features)
    with pytest.raises(ValueError, match=f"hold {16 * len(counted.images)} image tokens, the images give 16 visual"):
        ours.packed_loss(counted, features[:1])
