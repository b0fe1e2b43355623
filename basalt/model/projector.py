"""The projector: the trained 2-layer MLP between tower and base LM (LLaVA-1.5's `mlp2x_gelu`)."""

import math
from collections.abc import Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from basalt.assistants import Assistant, AssistantError


class Projector(nn.Module):
    """Linear → GELU → Linear: patch features `[..., tower_dim]` → visual tokens `[..., lm_dim]`.

    Named `linear_1` and `linear_2` as in transformers' Llava, so that weights carry over as they are.
    """

    def __init__(self, tower_dim: int, hidden: int, lm_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(tower_dim, hidden)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden, lm_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))

    @torch.no_grad()
    def scale_output(self, std: float) -> None:
        """Scales the last layer so that standardised features give visual tokens with the standard deviation `std`,
        that of the base LM's own embeddings: a projector that shouts is slow to align."""
        probe = torch.randn(4096, self.linear_1.in_features, generator=torch.Generator().manual_seed(0))
        factor = std / self(probe.to(self.linear_1.weight)).std()
        self.linear_2.weight.mul_(factor)
        self.linear_2.bias.mul_(factor)

    @torch.no_grad()
    def folded(self, mean: Tensor, std: Tensor) -> "Projector":
        """A projector for raw features that equals this one on standardised features `(x - mean) / std`.

        Training sees standardised channels, which Adam needs; what is published is the plain MLP.
        """
        raw = Projector(self.linear_1.in_features, self.linear_1.out_features, self.linear_2.out_features)
        weight = self.linear_1.weight.float() / std
        raw.linear_1.weight.copy_(weight)
        raw.linear_1.bias.copy_(self.linear_1.bias.float() - weight @ mean)
        raw.linear_2.load_state_dict(self.linear_2.state_dict())
        return raw

    def unfolded(self, mean: Tensor, std: Tensor) -> "Projector":
        """The inverse of `folded`: a projector for standardised features that equals this one on raw ones."""
        return self.folded(-mean / std, 1 / std)

    def take(self, weights: Mapping[str, Tensor], whose: str) -> None:
        """Takes weights over.

        Args:
            whose: stands before the message of an error.

        Raises:
            AssistantError: they are of other widths, or no projector's.
        """
        shapes = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if found.keys() != shapes.keys():
            raise AssistantError(f"{whose} holds {', '.join(sorted(found)) or 'nothing'}, not a projector's weights")
        if found != shapes:
            raise AssistantError(
                f"{whose} has a projector of widths {_widths(found)} (tower → hidden → base LM), "
                f"but {_widths(shapes)} is wanted: use the tower and base LM it was trained for, or train one anew"
            )
        self.load_state_dict(weights)

    def save(self, path: str) -> None:
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path)


def load_projector(assistant: Assistant) -> Projector:
    """The projector of one assistant, float32, in eval mode.

    Raises:
        AssistantError: its weights do not have the widths the manifest states, or are not finite.
    """
    spec = assistant.manifest
    projector = Projector(spec.tower.width, spec.projector.hidden, spec.base_lm.lm_dim)
    weights = {name: value.float() for name, value in load_file(assistant.path(spec.projector.file)).items()}
    projector.take(weights, spec.name)
    if not all(math.isfinite(value.abs().sum().item()) for value in weights.values()):
        raise AssistantError(f"{spec.name}: the projector holds values that are not finite")
    return projector.requires_grad_(False).eval()


def _widths(shapes: Mapping[str, tuple[int, ...]]) -> str:
    (hidden, tower), (lm_dim, _) = shapes["linear_1.weight"], shapes["linear_2.weight"]
    return f"{tower} → {hidden} → {lm_dim}"
