"""From what a client asked for to the plan of the job: the named recipe, with the client's data and wishes.

Asked twice: when a job is submitted, so that what cannot be is refused at once, and by the worker, with the
uploaded files where they lie on its machine.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from basalt.api_errors import bad_request
from basalt.assistants import Manifest
from basalt.record.jobs import Job
from basalt.train.fit import KEEPS_AN_ASSISTANT, misfits
from basalt.train.plan import Plan, Stage
from basalt.train.recipe import Recipe
from services.trainer.schema import DataSpec, Hyperparameters, JobRequest, StageSpec

# Of a recipe, not a client's to say: they are the server's files, or follow from the job.
OWN = {"base_lm", "tower", "image_token_id", "projector_hidden", "features", "data", "held_out", "start"}
Recipes = dict[str, dict[str, Any]]  # as they stand in their files, by stage
OPENAI = ("n_epochs", "batch_size", "learning_rate_multiplier")


def plan(
    request: JobRequest,
    *,
    job_id: str,
    recipes: Path,
    accepted: Recipes,
    features: Path,
    find: Callable[[str], Path],
    start: Path | None,
    parent: Job | Manifest | None,
) -> Plan:
    """The plan of a job.

    Args:
        recipes: today's, of all models.
        accepted: those that the job is done by.
        find: the path of an uploaded file, by its id, or of one under the data root.
        start: the run of stage 1, or the assistant's directory, that a job of stage 2 alone goes on from; with both
            stages it is this job's own run.
        parent: the job whose run `start` is, or the assistant's manifest.

    Raises:
        APIError: (400) what cannot be, and what could.
    """
    named = request.method.stages()
    if (start is not None) != (request.method.type == "stage2"):
        raise bad_request(
            "'start' belongs to a method of type 'stage2', and that needs one: a stage 1 job or an assistant", "start"
        )
    if named[-1][0] == "stage2" and not isinstance(parent, Manifest):
        _check_start(request.model, None if parent is None else parent.request["model"], recipes, accepted)
    stages = []
    for name, spec in named:
        recipe = accepted[name] | {
            "features": str(features),
            "data": _data(request, name, spec, find),
            "held_out": None,
        }
        recipe.pop("grounding", None) if not any(source.get("boxes") for source in recipe["data"]) else None
        if request.validation_file is not None:
            recipe["held_out"] = _source(DataSpec(rows=request.validation_file, images=request.images_file), find)
        recipe |= _wishes(request, name, spec.hyperparameters, recipe)
        recipe["start"] = None if start is None else str(start)
        try:
            stages.append(Stage(name=name, recipe=Recipe.model_validate(recipe)))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise bad_request(f"method.{name}: {field}: {first['msg']}", f"method.{name}.hyperparameters") from None
    if isinstance(parent, Manifest):
        _check_version(parent, request.model, stages[-1].recipe)
    if any(stage.recipe.keep_start for stage in stages) and not (isinstance(parent, Manifest) and parent.lora):
        raise bad_request(KEEPS_AN_ASSISTANT, f"method.{stages[-1].name}.hyperparameters.keep_start")
    lineage = {"job": job_id, "recipe": request.model, "request": request.model_dump(mode="json")}
    if isinstance(parent, Job):  # of a version the run itself tells
        lineage["parent"] = (parent.result or {}).get("model")
    return Plan(name=request.suffix or job_id, stages=stages, lineage=lineage)


def recipes_of(request: JobRequest, recipes: Path) -> Recipes:
    """The recipes of what is to be trained, by stage.

    Raises:
        APIError: (400) there are none of this name.
    """
    known = sorted(path.parent.name for path in recipes.glob("*/stage2.yaml"))
    if request.model not in known:
        raise bad_request(
            f"'model' is what is trained: one of {', '.join(known)}; {request.model!r} is not",
            "model",
            "model_not_found",
        )
    return {name: _read(recipes / request.model / f"{name}.yaml") for name, _ in request.method.stages()}


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def _check_start(model: str, parent: str | None, recipes: Path, accepted: Recipes) -> None:
    """Sees that stage 2 of the recipe `model` can go on from stage 1 of `parent`, or without one from its own."""
    path = recipes / (parent or model) / "stage1.yaml"
    first = accepted["stage1"] if parent is None else _read(path) if path.is_file() else None
    if first is None:  # it is gone since: the projector itself is looked at before training starts
        return
    before, wanted = _widths(first), _widths(accepted["stage2"])
    if before[:2] != wanted[:2] or (before[2] != wanted[2] and None not in (before[2], wanted[2])):
        raise bad_request(
            f"the projector to start from was trained as {parent or model!r}, of widths {_written(before)} "
            f"(tower → hidden → base LM), but {model!r} needs {_written(wanted)}: "
            f"start from a stage 1 job of {model!r}, or train both stages (two_stage)",
            "start" if parent else "model",
            "projector_does_not_fit",
        )


def _check_version(manifest: Manifest, model: str, recipe: Recipe) -> None:
    """Sees that stage 2 of the recipe `model` can go on from a published assistant."""
    if told := misfits(manifest, recipe, _lm_dim(recipe.base_lm)):
        raise bad_request(
            f"the assistant {manifest.name} does not fit the recipe {model!r}: {'; '.join(told.values())}",
            "start",
            "lora_does_not_fit" if told.keys() == {"lora.rank"} else "projector_does_not_fit",
        )


def _widths(recipe: dict[str, Any]) -> tuple[int, int, int | None]:
    """Of its projector: tower, hidden, base LM; that is None where the base LM is not a directory of this machine."""
    return recipe["tower"]["width"], recipe["projector_hidden"], _lm_dim(Path(os.path.expandvars(recipe["base_lm"])))


def _lm_dim(base_lm: Path) -> int | None:
    config = base_lm / "config.json"
    return json.loads(config.read_text())["hidden_size"] if config.is_file() else None


def _written(widths: tuple[int, int, int | None]) -> str:
    return " → ".join("?" if width is None else str(width) for width in widths)


def _data(request: JobRequest, name: str, spec: StageSpec, find: Callable[[str], Path]) -> list[dict[str, Any]]:
    named = [] if request.training_file is None else [DataSpec(rows=request.training_file, images=request.images_file)]
    if not named and not spec.data:
        raise bad_request(
            f"{name} has nothing to learn from: give a 'training_file', or 'data' in its method", "training_file"
        )
    return [_source(source, find) for source in [*named, *spec.data]]


def _source(spec: DataSpec, find: Callable[[str], Path]) -> dict[str, Any]:
    paths = {
        name: str(find(value)) for name in ("rows", "images", "boxes") if (value := getattr(spec, name)) is not None
    }
    return {**paths, "weight": spec.weight} | ({"prompts": spec.prompts} if spec.prompts else {})


def _wishes(request: JobRequest, name: str, asked: Hyperparameters, recipe: dict[str, Any]) -> dict[str, Any]:
    """The fields of the recipe that the client changes."""
    extra = asked.model_extra or {}
    if refused := sorted(OWN & extra.keys()):
        raise bad_request(
            f"'{refused[0]}' is not a hyper-parameter: it is the recipe's or follows from the job",
            f"method.{name}.hyperparameters.{refused[0]}",
        )
    wishes = dict(extra)
    older = request.hyperparameters or Hyperparameters()
    epochs, batch, rate = (getattr(older if getattr(asked, field) == "auto" else asked, field) for field in OPENAI)
    if request.seed is not None:
        wishes["seed"] = request.seed
    if "steps" in extra or "epochs" in extra:  # one takes the place of the other
        wishes = {"steps": None, "epochs": None} | wishes
    else:
        wishes |= {"steps": None, "epochs": 1.0 if epochs == "auto" else epochs}
    if batch != "auto":
        rows = next((rows for rows in range(min(recipe["rows_per_pass"], batch), 0, -1) if batch % rows == 0), batch)
        wishes |= {"rows_per_pass": rows, "passes_per_step": batch // max(rows, 1)}
    if rate != "auto":
        wishes["projector_learning_rate"] = (
            wishes.get("projector_learning_rate", recipe["projector_learning_rate"]) * rate
        )
        if recipe.get("lora"):
            lora = recipe["lora"] | wishes.get("lora", {})
            wishes["lora"] = lora | {"learning_rate": lora.get("learning_rate", 2e-4) * rate}
    if "lora" in wishes and recipe.get("lora"):
        wishes["lora"] = recipe["lora"] | wishes["lora"]
    return wishes


def find_in(root: Path | None, name: str) -> Path:
    """A file or folder under the data root.

    Raises:
        APIError: (400) there is no such file, or no data root.
    """
    if root is None:
        raise bad_request(f"{name!r} is not the id of a file: upload it to /v1/files and give its id (file-…)")
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()) or not path.exists():
        raise bad_request(
            f"there is no {name!r} under the trainer's data root, and it is not the id of a file (file-…)"
        )
    return path
