"""Runs that are killed, stopped and damaged, and end as if nothing had been."""

import itertools
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from basalt.train import checkpoints
from basalt.train.checkpoints import learned
from basalt.train.progress import read_log
from basalt.train.recipe import DataSource, Grounding, Recipe
from basalt.train.stage1_align import train_stage1
from basalt.train.stage2_instruct import train_stage2
from basalt.train.stop import Stop, Stopped, never
from tests.train.runs import masters, needs_compiler, same

KILLS = 20


@pytest.fixture(scope="module")
def grounded(stage1: Recipe, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A short stage 1 that begins with grounding and writes a checkpoint each step."""
    boxes = tmp_path_factory.mktemp("boxes") / "boxes.json"
    boxes.write_text('{"red-ellipse.png": [["r", 0.0, 0.0, 0.5, 1.0]]}')
    source = stage1.data[0].model_copy(update={"boxes": boxes})
    update = {"data": [source], "grounding": Grounding(steps=5), "steps": 12, "checkpoint_every": 1}
    return stage1.model_copy(update=update | {"held_out": None, "samples": 0})


def apart(train: Callable[[Recipe, Path], None], recipe: Recipe, directory: Path) -> None:
    """Trains in a process of its own, made to be killed."""
    tqdm.set_lock(threading.RLock())  # the inherited one would stay locked for all, were its holder killed
    train(recipe, directory)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(
    grounded: Recipe, stage2: Recipe, tmp_path: Path
) -> None:
    train_stage1(grounded, tmp_path / "aligned")
    tuned = stage2.model_copy(update={"start": tmp_path / "aligned", "steps": 12, "checkpoint_every": 1})
    fork = multiprocessing.get_context("forkserver")  # each run a process of its own, without importing torch again
    fork.set_forkserver_preload(["basalt.train.stage1_align", "basalt.train.stage2_instruct"])
    rng = random.Random(1)
    for train, recipe in ((train_stage1, grounded), (train_stage2, tuned)):
        for again in ("", "-again"):  # the first time it also waits for the imports
            whole = tmp_path / f"{train.__name__}-whole{again}"
            began = time.monotonic()
            process = fork.Process(target=apart, args=(train, recipe, whole))
            process.start()
            process.join()
            seconds = time.monotonic() - began
        kills = 0
        for attempt in itertools.count():
            if kills >= KILLS // 2:
                break
            directory = tmp_path / f"{train.__name__}-{attempt}"
            for patience in (rng.uniform(0.1, 1) * seconds, rng.uniform(0.1, 1) * seconds, None):
                process = fork.Process(target=apart, args=(train, recipe, directory))
                process.start()
                process.join(patience)
                if process.is_alive():
                    process.kill()
                    process.join()
                    kills += 1
            assert process.exitcode == 0
            assert same(masters(directory), masters(whole))


def test_a_run_asked_to_stop_does_so_at_once_and_goes_on(grounded: Recipe, tmp_path: Path) -> None:
    train_stage1(grounded, tmp_path / "whole")
    asked = itertools.chain([False, False, True], [False, False, False, True])  # in grounding, then two steps after it
    for phase in ("grounding", "."):
        with pytest.raises(Stopped, match="stopped at step"):
            train_stage1(grounded, tmp_path / "stopped", lambda: next(asked))
        assert checkpoints.saved(tmp_path / "stopped" / phase)
    assert learned(tmp_path / "stopped")["step"] < grounded.steps
    train_stage1(grounded, tmp_path / "stopped")
    assert same(masters(tmp_path / "stopped"), masters(tmp_path / "whole"))
    steps = [line["step"] for line in read_log(tmp_path / "stopped")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_compiler
@pytest.mark.parametrize("row_length", [160, 400], ids=["plain", "segments"])
def test_a_compiled_run_that_was_stopped_ends_with_the_same_weights(
    row_length: int, stage2: Recipe, aligned: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever sizes come first where it goes on."""
    monkeypatch.setattr("basalt.train.loop.COMPILE_FROM", 1)
    rng = random.Random(3)
    names = sorted(path.name for path in (data / "images").iterdir())
    rows = []
    for number in range(40):
        words = rng.choice([1, 3, 6, 10, 20]) * row_length // 160
        said = " ".join(rng.choice(["red", "green", "oval"]) for _ in range(words))
        turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": said}]
        rows.append({"image": names[number % len(names)], "conversations": turns})
        if number % 3 == 0:
            rows.append({"conversations": [{"from": "human", "value": "?"}, turns[1]]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = DataSource(rows=tmp_path / "rows.json", images=data / "images")
    update = {"start": aligned, "dtype": "bfloat16", "row_length": row_length, "rows_per_pass": 1, "data": [source]}
    recipe = stage2.model_copy(update=update | {"steps": 12})

    def train(directory: Path, stop: Stop = never) -> None:
        torch._dynamo.reset()  # as a process of its own would begin
        train_stage2(recipe, directory, stop)

    train(tmp_path / "whole")
    asked = itertools.chain([False] * 6, [True])
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", lambda: next(asked))
    train(tmp_path / "stopped")
    assert same(masters(tmp_path / "stopped"), masters(tmp_path / "whole"))


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    grounded: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_stage1(grounded, tmp_path / "run")
    before, last = checkpoints.saved(tmp_path / "run")
    last.path.write_bytes(last.path.read_bytes()[:-1])
    assert learned(tmp_path / "run")["step"] == before.step == grounded.steps - 1
    assert "is damaged" in caplog.text
    before.path.write_bytes(b"")
    with pytest.raises(checkpoints.CheckpointError, match="every checkpoint"):
        train_stage1(grounded, tmp_path / "run")


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoints.save(tmp_path, step, {"step": step, "value": torch.tensor(step)})
        checkpoints.prune(tmp_path, best_step=2)
    assert [checkpoint.step for checkpoint in checkpoints.saved(tmp_path)] == [2, 5, 6]
    (tmp_path / "checkpoints" / "unfinished").write_bytes(b"half")
    state = checkpoints.load_last(tmp_path)
    assert state is not None
    assert state["value"] == 6
