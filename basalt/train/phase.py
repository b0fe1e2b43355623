"""A phase: numbered steps that can be stopped, killed and gone on with at any moment, to the same end.

Step `n` sees the same batch whenever it is run, and a checkpoint holds everything that steps change. So a run that
was interrupted ends with the very weights of one that was not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from basalt.train import checkpoints
from basalt.train.data import prefetched
from basalt.train.progress import EVERY, Tally, Telling, read_log
from basalt.train.said import log
from basalt.train.stop import Stop, Stopped

B = TypeVar("B")


@dataclass
class Phase(Generic[B]):
    """What is done `steps` times.

    Attributes:
        directory: where its checkpoints and its log are.
        deal: the batch of a step, by its number from 0; called ahead, in a thread of its own.
        work: runs one step.
        state, load: everything that steps change, and how it is taken over again.
        evaluate: figures on held-out data, asked for at checkpoints.
        stop: asked after every step.
    """

    name: str
    directory: Path
    steps: int
    checkpoint_every: int
    deal: Callable[[int], B]
    work: Callable[[int, B], Tally]
    state: Callable[[], dict[str, Any]]
    load: Callable[[dict[str, Any]], None]
    stop: Stop
    evaluate: Callable[[], dict[str, Any]] = field(default=dict)

    def run(self) -> None:
        """Does the steps that are left.

        Raises:
            Stopped: `stop` said so.
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        first = self._resume()
        leading = not dist.is_initialized() or dist.get_rank() == 0
        numbers = range(first, self.steps)
        with Telling(self.directory, self.name, first, self.steps, leading=leading) as telling:
            for number, batch in zip(numbers, prefetched(self.deal, numbers), strict=True):
                telling.add(self.work(number, batch))
                step = number + 1
                last, due, stopping = step == self.steps, step % self.checkpoint_every == 0, self._stopping()
                if last or due:
                    telling.tell(step, **self.evaluate())
                elif step % EVERY == 0:
                    telling.tell(step)
                if leading and (last or due or stopping):
                    checkpoints.save(self.directory, step, {"step": step, "rng": torch.get_rng_state()} | self.state())
                    checkpoints.prune(self.directory, self._best())
                telling.begin() if last or due else None
                if stopping and not last:
                    raise Stopped(f"stopped at step {step} of {self.steps}; started again, it goes on from there")

    def _resume(self) -> int:
        state = checkpoints.load_last(self.directory)
        if state is None:
            return 0
        self.load(state)
        torch.set_rng_state(state["rng"])
        log.info(f"{self.name}: going on from step {state['step']} of {self.steps}")
        return state["step"]

    def _stopping(self) -> bool:
        """Whether any of the processes that train together was asked to stop: all stop at the same step."""
        if not dist.is_initialized():
            return self.stop()
        asked = torch.tensor([int(self.stop())])
        asked = asked.cuda() if dist.get_backend() == "nccl" else asked
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _best(self) -> int | None:
        """The step of the lowest held-out loss."""
        measured = [line for line in read_log(self.directory) if "held_out_loss" in line]
        return int(min(measured, key=lambda line: line["held_out_loss"])["step"]) if measured else None
