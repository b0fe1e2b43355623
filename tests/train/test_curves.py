"""Figures arrive in each tool, and a run that goes on is the same run there."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from basalt.train.curves import open_curves


def tell(directory: Path, first: int, *steps: int) -> None:
    opened = open_curves(directory, first)
    for step in steps:
        for curves in opened:
            curves.figures(step, {"loss": 1 / step})
            curves.text(step, "sample 0", f"What?\n\n**A cat, at step {step}.**")
    for curves in opened:
        curves.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "stage1"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text(json.dumps({"row_length": 320}))
    return run


def test_tensorboard_shows_a_resumed_run_as_one(directory: Path) -> None:
    tell(directory, 0, 1, 2, 3)
    tell(directory, 2, 3, 4)
    read = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]


def test_mlflow_shows_a_resumed_run_as_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("BASALT_CURVES", '["mlflow"]')
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (directory / "mlruns").as_uri())
    tell(directory, 0, 1, 2)
    tell(directory, 2, 3)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("basalt").experiment_id])
    assert run.info.run_name == "runs/stage1"
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["recipe.json", "sample 0"]


def test_wandb_keeps_a_run(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("BASALT_CURVES", '["wandb"]')
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(directory, 0, 1, 2)
    wandb.teardown()  # `finish` does not wait for its service to have written; the end of a process does
    (kept,) = (directory / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"row_length" in kept.read_bytes()


def test_an_unknown_tool_is_refused_by_name(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASALT_CURVES", '["excel"]')
    with pytest.raises(ValueError, match="wandb"):
        open_curves(directory, 0)
