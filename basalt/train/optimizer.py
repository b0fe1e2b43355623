"""AdamW on float32 masters, and the learning rate's course."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class MasterAdamW:
    """AdamW on float32 copies of bf16 parameters: bf16 alone loses the small steps of a low learning rate.

    Gradients are float32 from the first pass of a step on: added up in bf16, 16 passes would be off by 0.4 %, and one
    process by more than several. Where several processes train together, their gradients are added up.

    Args:
        groups: parameters by name, and their peak learning rate.
    """

    def __init__(self, groups: list[tuple[dict[str, nn.Parameter], float]], weight_decay: float) -> None:
        named = {name: parameter for parameters, _ in groups for name, parameter in parameters.items()}
        self.names, self.parameters = list(named), list(named.values())
        for parameter in self.parameters:
            parameter.grad_dtype = torch.float32  # autograd casts each pass's gradient, and adds to what is there
        self.masters = [parameter.detach().float().clone().requires_grad_() for parameter in self.parameters]
        of = dict(zip(self.names, self.masters, strict=True))
        self.peaks = [rate for _, rate in groups]
        self.adamw = torch.optim.AdamW(
            [{"params": [of[name] for name in parameters], "lr": rate} for parameters, rate in groups],
            betas=(0.9, 0.999),
            weight_decay=weight_decay,
            fused=True,
        )

    def step(self, factor: float, clip: float) -> Tensor:
        """One update with every learning rate times `factor`; returns the gradient's norm before clipping."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        if dist.is_initialized():
            self._add_up_gradients()
        norm = nn.utils.clip_grad_norm_(self.masters, clip)
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.adamw.step()
        self._hand_over()
        return norm

    def _add_up_gradients(self) -> None:
        """In one message. A process whose rows had no image has no gradient of the projector: it adds nothing."""
        grads = [torch.zeros_like(master) if master.grad is None else master.grad for master in self.masters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for master, part in zip(self.masters, flat.split([master.numel() for master in self.masters]), strict=True):
            master.grad = part.view_as(master)

    def state(self) -> dict[str, Any]:
        return {"masters": dict(zip(self.names, self.masters, strict=True)), "adamw": self.adamw.state_dict()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` told, parameters included.

        Raises:
            ValueError: it was told of other parameters.
        """
        if list(state["masters"]) != self.names:
            other = sorted(set(state["masters"]) ^ set(self.names))
            raise ValueError(f"the checkpoint was made training other parameters: {', '.join(other[:5])} …")
        for master, value in zip(self.masters, state["masters"].values(), strict=True):
            master.copy_(value)
        self.adamw.load_state_dict(state["adamw"])
        self._hand_over()

    @torch.no_grad()
    def _hand_over(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)


def rate_factor(step: int, steps: int, *, warmup: float, decay: float) -> float:
    """Linear warm-up, then level, then cosine to zero over the last `decay` share of the steps."""
    warm = max(round(warmup * steps), 1)
    decay_from = max(round((1 - decay) * steps), warm)
    if step < warm:
        return (step + 1) / warm
    if step < decay_from:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - decay_from) / max(steps - decay_from, 1)))
