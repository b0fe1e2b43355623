"""The embedded default's tower: its shapes, and what its coordinates say."""

from typing import Any

import pytest
import torch
from PIL import Image

from basalt.assistants import TowerSpec
from basalt.model.vision_encoder import attend_by_products, efficientnet_lite_weights, load_vision_encoder

PLAIN = TowerSpec(kind="efficientnet-lite", id="efficientnet-lite2", image_size=96, tokens=9, width=2528, fit="resize")


def test_coordinates_follow_the_features_and_tell_row_and_column() -> None:
    plain = load_vision_encoder(PLAIN)
    placed = load_vision_encoder(PLAIN.model_copy(update={"width": 2534, "coordinates": True}))
    pixels = torch.stack([plain.preprocess(Image.new("RGB", (40, 30), colour)) for colour in ("red", "blue")])
    features, with_places = plain(pixels), placed(pixels)
    assert torch.equal(with_places[..., :2528], features)
    for image in with_places:
        for token, (row, column) in enumerate((row, column) for row in range(3) for column in range(3)):
            expected = torch.zeros(6)
            expected[row] = expected[3 + column] = 1.0
            assert torch.equal(image[token, 2528:], expected)


def test_the_folded_network_sees_what_the_whole_one_sees() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    whole: Any = EfficientNet.from_name("efficientnet-lite2").eval()
    whole.load_state_dict(torch.load(efficientnet_lite_weights(), weights_only=True))
    spec = PLAIN.model_copy(update={"image_size": 256, "tokens": 64})
    pixels = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = pixels.clone()
    with torch.no_grad():
        expected = whole.extract_features(pixels).flatten(2).transpose(1, 2)  # [2, 64, 1280]
    torch.testing.assert_close(load_vision_encoder(spec)(pixels)[..., :1280], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(pixels, given)


def test_a_spec_of_another_width_is_refused() -> None:
    tower = load_vision_encoder(PLAIN.model_copy(update={"coordinates": True}))
    with pytest.raises(ValueError, match=r"\(1, 9, 2534\), its spec says \(1, 9, 2528\)"):
        tower(torch.zeros(1, 3, 96, 96))


def test_a_transformer_has_positions_of_its_own() -> None:
    spec = TowerSpec(kind="siglip", id="x", image_size=32, tokens=4, width=32, fit="resize", coordinates=True)
    with pytest.raises(ValueError, match="coordinates"):
        load_vision_encoder(spec)


def test_attention_by_products_is_attention() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 9, 3, 8).transpose(1, 2) for _ in range(3))  # as a layer hands them over
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(attend_by_products(query, key, value, 0.3), expected)
