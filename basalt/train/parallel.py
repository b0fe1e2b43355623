"""Several processes that train one model together, as `torchrun` or `accelerate launch` starts them.

Each runs its share of a step's passes; the gradients, a few MB of projector and LoRA, are added up once a step
(see `MasterAdamW`). The frozen LM is the same in all, or cut up among them by FSDP2.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


@contextmanager
def together() -> Iterator[None]:
    """Joins the processes that the launcher started, if it started several."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def leader_first() -> Iterator[None]:
    """The first process does what is inside, then the others: they find files that it wrote."""
    leading = rank_and_world()[0] == 0
    if dist.is_initialized() and not leading:
        dist.barrier()
    yield
    if dist.is_initialized() and leading:
        dist.barrier()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def added_up(numbers: list[float]) -> list[float]:
    """Each number, summed over the processes."""
    if not dist.is_initialized():
        return numbers
    summed = torch.tensor(numbers, dtype=torch.float64, device=device())
    dist.all_reduce(summed)
    return summed.tolist()


def shard(layers: nn.ModuleList) -> None:
    """Cuts the frozen weights of each layer up among the processes; what is trained stays whole in each."""
    for layer in layers:
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, ignored_params=trained)
