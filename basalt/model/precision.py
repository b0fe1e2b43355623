"""Which precision a device computes in: bfloat16 where it has instructions for it, else float32."""

import torch


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the faster one. A CPU without instructions for it, as most desktops' are, takes about eight
    times as long for a product in bfloat16 as in float32."""
    return device.type != "cpu" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that a setting (`auto`, `bfloat16`, `float32`) means on a device."""
    if precision == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return getattr(torch, precision)


def name_of(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `bfloat16`."""
    return str(dtype).removeprefix("torch.")
