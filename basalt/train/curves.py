"""Where a run's figures and sampled answers can be watched: TensorBoard, and Weights & Biases or MLflow by setting."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic_settings import BaseSettings, SettingsConfigDict
from torch.utils.tensorboard.writer import SummaryWriter


class CurveSettings(BaseSettings):
    """Each service's own variables (`WANDB_API_KEY`, `MLFLOW_TRACKING_URI`, …) say where it is."""

    model_config = SettingsConfigDict(env_prefix="BASALT_")
    curves: list[Literal["wandb", "mlflow"]] = []  # besides TensorBoard; as JSON: ["wandb"]
    curves_project: str = "basalt"


class Curves(Protocol):
    def figures(self, step: int, told: dict[str, float]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


def open_curves(directory: Path, first: int) -> list[Curves]:
    """Curves of the run in `directory`, which goes on after step `first`.

    Raises:
        ValueError: a package that the setting asks for is not installed.
    """
    settings = CurveSettings()
    opened: list[Curves] = [TensorBoard(directory, first)]
    for kind in settings.curves:
        try:
            opened.append({"wandb": WeightsAndBiases, "mlflow": MLflow}[kind](directory, settings.curves_project))
        except ImportError:
            raise ValueError(f"BASALT_CURVES asks for {kind}, which is not installed: pip install {kind}") from None
    return opened


def _about(directory: Path) -> tuple[str, dict[str, Any]]:
    """A run's name and recipe."""
    recipe = directory / "recipe.json"
    return "/".join(directory.absolute().parts[-2:]), json.loads(recipe.read_text()) if recipe.is_file() else {}


class TensorBoard:
    def __init__(self, directory: Path, first: int) -> None:
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first + 1)

    def figures(self, step: int, told: dict[str, float]) -> None:
        for name, value in told.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run that goes on is the same run there: its id comes from its directory."""

    def __init__(self, directory: Path, project: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        name, recipe = _about(directory)
        identity = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project, name=name, id=identity, resume="allow", dir=str(directory), config=recipe
        )

    def figures(self, step: int, told: dict[str, float]) -> None:
        self._run.log(told, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run.log({name: wandb.Html(text.replace("\n", "<br>"))}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run that goes on is the same run there: its id is kept in its directory."""

    def __init__(self, directory: Path, project: str) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client = MlflowClient()
        kept = directory / "mlflow-run"
        if kept.is_file():
            self._run = kept.read_text()
            self._client.set_terminated(self._run, "RUNNING")
            return
        name, recipe = _about(directory)
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self._run = self._client.create_run(number, run_name=name).info.run_id
        self._client.log_dict(self._run, recipe, "recipe.json")
        kept.write_text(self._run)

    def figures(self, step: int, told: dict[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = round(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in told.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._run, text, f"{name}/{step:08d}.md")

    def close(self) -> None:
        self._client.set_terminated(self._run)
