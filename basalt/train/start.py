"""What a run of stage 2 begins with: the projector of a stage 1 run, or a published assistant's projector and LoRA."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from basalt.assistants import MANIFEST, load_assistant
from basalt.catalog import reference
from basalt.model.projector import Projector, load_projector
from basalt.train.checkpoints import learned
from basalt.train.fit import KEEPS_AN_ASSISTANT, misfits
from basalt.train.lora import check_adapter
from basalt.train.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Start:
    """
    Attributes:
        projector: float32.
        standardizer: state of the one the projector was trained behind; None where the projector takes raw features.
        adapter: directory of the LoRA that is trained on; None for a fresh one.
        parent: NAME@HEX of the assistant; None of a run, which may be published later than this.
    """

    projector: Projector
    standardizer: dict[str, Tensor] | None = None
    adapter: Path | None = None
    parent: str | None = None


def read_start(recipe: Recipe, lm_dim: int) -> Start | None:
    """The recipe's `start`; None where it names none.

    Raises:
        RecipeError: the assistant does not fit the recipe; tells both. Or a share is to be kept of what is none.
        AssistantError: the run's projector has other widths, or files of the assistant are missing or changed.
        FileNotFoundError: there is neither an assistant nor a checkpoint.
    """
    assistant = load_assistant(recipe.start) if recipe.start and (recipe.start / MANIFEST).is_file() else None
    if recipe.keep_start and (assistant is None or assistant.manifest.lora is None or recipe.lora is None):
        raise RecipeError(KEEPS_AN_ASSISTANT)
    if recipe.start is None:
        return None
    if assistant is None:
        state = learned(recipe.start)
        projector = Projector(recipe.tower.width, recipe.projector_hidden, lm_dim)
        projector.take(state["projector"], f"{recipe.start}, where this run starts,")
        return Start(projector, state["standardizer"])
    spec = assistant.manifest
    if told := misfits(spec, recipe, lm_dim):
        raise RecipeError(f"{recipe.start}, where this run starts, does not fit: {'; '.join(told.values())}")
    adapter = None if spec.lora is None else assistant.path(spec.lora.dir)
    if adapter is not None and recipe.lora is not None:
        check_adapter(adapter, recipe.lora)
    return Start(load_projector(assistant), adapter=adapter, parent=reference(assistant))
