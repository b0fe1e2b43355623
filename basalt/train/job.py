"""A training job's own process: `python -m basalt.train.job DIRECTORY`, with the plan in `DIRECTORY/plan.json`.

SIGTERM stops it within a step, with a checkpoint; started again, it goes on. The exit code tells what came of it,
and where the job was refused, `refusal.json` tells why.
"""

import errno
import shutil
import signal
import sys
import threading
from pathlib import Path

from basalt.train.plan import PLAN, PUBLISHED, REFUSAL, Plan, Refusal

DONE, REFUSED, NO_ROOM, STOPPED = 0, 3, 4, 75


def main(directory: Path) -> int:
    """Does the job's stages and publishes into `DIRECTORY/published`."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    import torch  # after the handlers stand: it takes seconds

    from basalt.train.stop import Stopped

    plan = Plan.model_validate_json((directory / PLAN).read_text())
    try:
        run(plan, directory, asked.is_set)
    except Stopped as stopped:
        print(stopped, flush=True)
        return STOPPED
    except (MemoryError, torch.OutOfMemoryError) as error:
        return refuse(directory, "out_of_memory", f"{smaller(plan)} ({str(error).splitlines()[0]})")
    except (ValueError, FileNotFoundError) as error:  # ours all are: DataError, RecipeError, ImageError, …
        return refuse(directory, "invalid_training_job", str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return refuse(directory, "disk_full", f"no room left for a checkpoint in {directory}: {error}", NO_ROOM)
    return DONE


def run(plan: Plan, directory: Path, stop) -> None:
    from basalt.train.publish import publish
    from basalt.train.stage1_align import train_stage1
    from basalt.train.stage2_instruct import train_stage2

    for stage in plan.stages:
        if stage.name == "stage1":
            train_stage1(stage.recipe, directory / stage.name, stop)
        else:
            start = stage.recipe.start or directory / "stage1"
            train_stage2(stage.recipe.model_copy(update={"start": start}), directory / stage.name, stop)
    shutil.rmtree(directory / PUBLISHED, ignore_errors=True)
    publish(directory / plan.stages[-1].name, plan.name, directory / PUBLISHED, plan.lineage)


def smaller(plan: Plan) -> str:
    """What would need less memory and learn the same."""
    recipe = plan.stages[-1].recipe
    rows, passes = recipe.rows_per_pass, recipe.passes_per_step
    if rows == 1:
        return "out of memory with one row at a time: set recompute or quantize, or a shorter row_length"
    return (
        f"out of memory with rows_per_pass = {rows}: {rows // 2} rows with passes_per_step = {passes * 2} are the same"
        " batch and need about half the memory for activations"
    )


def refuse(directory: Path, code: str, message: str, status: int = REFUSED) -> int:
    print(f"{code}: {message}", file=sys.stderr, flush=True)
    (directory / REFUSAL).write_text(Refusal(code=code, message=message).model_dump_json())
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
