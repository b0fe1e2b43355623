"""A job's own process: what it does again, and what its exit code and refusal tell."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from basalt.train import job
from basalt.train.alone import alone
from basalt.train.data import Dealer
from basalt.train.job import DONE, NO_MEMORY, REFUSED
from basalt.train.loop import Run
from basalt.train.plan import PLAN, REFUSAL, Plan, Refusal, Stage
from basalt.train.recipe import Recipe
from basalt.train.stop import Stopped, never


def planned(directory: Path, *stages: tuple[str, Recipe]) -> None:
    directory.mkdir(exist_ok=True)
    made = [Stage(name=name, recipe=recipe) for name, recipe in stages]  # type: ignore[arg-type]
    (directory / PLAN).write_text(Plan(name="pictures", stages=made, lineage={}).model_dump_json())


def refusal(directory: Path) -> Refusal:
    return Refusal.model_validate_json((directory / REFUSAL).read_text())


def test_a_stage_that_is_at_its_end_is_not_begun_again(
    stage1: Recipe, stage2: Recipe, aligned: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "job"
    shutil.copytree(aligned, directory / "stage1")
    gone = stage1.model_copy(update={"data": [stage1.data[0].model_copy(update={"rows": tmp_path / "gone.jsonl"})]})
    planned(directory, ("stage1", gone), ("stage2", stage2.model_copy(update={"steps": 2})))
    assert job.main(directory) == DONE
    shutil.rmtree(directory / "stage1")
    assert job.main(directory) == REFUSED
    assert "gone.jsonl" in refusal(directory).message


def test_out_of_memory_is_told_with_the_stage(stage1: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        torch.empty(2**50)

    monkeypatch.setattr("basalt.train.stage1_align.train_stage1", too_much)
    planned(tmp_path, ("stage1", stage1))
    assert job.main(tmp_path) == NO_MEMORY
    told = refusal(tmp_path)
    assert (told.code, told.stage) == ("out_of_memory", "stage1")
    assert "can't allocate memory" in told.message


def test_passes_in_parts_are_the_same_batch(stage1: Recipe, tmp_path: Path) -> None:
    run = Run(stage1, tmp_path / "run")
    whole, parted = (
        Dealer(run.dealer.sources, stage1.model_copy(update={"split": split}), pad_id=0) for split in (1, 2)
    )
    for step in range(3):
        one, other = whole.step(step), parted.step(step)
        assert one.supervised == other.supervised
        rows = [sum(len(batch.packed.ids) for batch in dealt.batches) for dealt in (one, other)]
        assert rows[0] == rows[1]
        assert max(len(batch.packed.ids) for batch in other.batches) == 1
        images = [[name for batch in dealt.batches for name in batch.packed.images] for dealt in (one, other)]
        assert images[0] == images[1]


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    told: list[str] = []

    def second() -> None:
        with alone(tmp_path, never):
            told.append("second")

    with alone(tmp_path, never):
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(Stopped, match="another process is at work"), alone(tmp_path, lambda: True):
            pass
        told.append("first")
    thread.join(10)
    assert told == ["first", "second"]
