"""A training job's own process: `python -m basalt.train.job DIRECTORY`, with the plan in `DIRECTORY/plan.json`.

SIGTERM stops it within a step, with a checkpoint; started again, it goes on. The exit code tells what came of it,
and where the job was refused, `refusal.json` tells why.
"""

import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from basalt.train.plan import PLAN, PUBLISHED, REFUSAL, SAID, Plan, Refusal
from basalt.train.said import log, say_to
from basalt.train.stop import Stop

DONE, REFUSED, NO_ROOM, NO_MEMORY, STOPPED = 0, 3, 4, 5, 75
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # what torch says there, as a RuntimeError
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def main(directory: Path) -> int:
    """Does the job's stages and publishes into `DIRECTORY/published`."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    import torch  # after the handlers stand: it takes seconds
    from safetensors import SafetensorError

    from basalt.train.alone import alone
    from basalt.train.checkpoints import CheckpointError
    from basalt.train.stop import Stopped

    say_to(directory / SAID)
    plan = Plan.model_validate_json((directory / PLAN).read_text())
    at: list[str] = []  # the stages begun
    try:
        # A worker that was killed may have left a process here, which stops when it is done with what it is at.
        with alone(directory, asked.is_set):
            run(plan, directory, asked.is_set, at.append)
    except Stopped as stopped:
        log.info(str(stopped))
        return STOPPED
    except (
        ValueError,
        FileNotFoundError,
        CheckpointError,
    ) as error:  # ours all are: DataError, RecipeError, ImageError, …
        return refuse(directory, REFUSED, "invalid_training_job", str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and CPU_ALLOCATOR not in str(error):
            raise
        return refuse(directory, NO_MEMORY, "out_of_memory", (str(error) or "MemoryError").splitlines()[0], at[-1])
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        if not full and os.strerror(errno.ENOSPC) not in str(error):  # safetensors tells it in words
            raise
        return refuse(directory, NO_ROOM, "disk_full", f"no room left in {directory}: {error}")
    return DONE


def run(plan: Plan, directory: Path, stop: Stop, begin: Callable[[str], None]) -> None:
    """The stages that are left, and publishing. `begin` is told the stage that is begun."""
    from basalt.train.checkpoints import is_complete
    from basalt.train.publish import publish
    from basalt.train.stage1_align import train_stage1
    from basalt.train.stage2_instruct import train_stage2

    last = plan.stages[-1].name
    for stage in plan.stages:
        begin(stage.name)
        out = directory / stage.name
        if stage.name != last and is_complete(out):
            continue  # its data need not be read again
        log.info(f"{stage.name}: reading its data")
        if stage.name == "stage1":
            train_stage1(stage.recipe, out, stop)
        else:
            start = stage.recipe.start or directory / "stage1"
            train_stage2(stage.recipe.model_copy(update={"start": start}), out, stop)
    shutil.rmtree(directory / PUBLISHED, ignore_errors=True)
    publish(directory / last, plan.name, directory / PUBLISHED, plan.lineage)


def refuse(directory: Path, status: int, code: str, message: str, stage: str = "") -> int:
    print(f"{code}: {message}", file=sys.stderr, flush=True)
    with suppress(OSError):  # on a full disk
        (directory / REFUSAL).write_text(Refusal(code=code, message=message, stage=stage).model_dump_json())
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
