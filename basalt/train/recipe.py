"""A recipe: everything that decides a training run, in one readable YAML file.

Relative paths are taken from the working directory, `$NAME` in them from the environment.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from basalt.assistants import TowerSpec


class RecipeError(ValueError):
    """A recipe that cannot be run. The message says which field and why."""


def _expand(value: object) -> object:
    expanded = os.path.expandvars(value) if isinstance(value, str) else value
    if isinstance(expanded, str) and "$" in expanded:
        raise ValueError(f"{value!r} names an environment variable that is not set")
    return expanded


ExpandedPath = Annotated[Path, BeforeValidator(_expand)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSource(_Part):
    """Rows, and the folder or tar of their images (see `basalt.data.readers`)."""

    rows: ExpandedPath
    images: ExpandedPath | None = None  # none where the rows hold their images, or have none
    weight: float = Field(default=1.0, gt=0)  # share of its groups seen in an epoch; 2.0 is twice, 0.5 half
    prompts: list[str] = Field(default=["Describe the image."], min_length=1)  # what a caption answers
    boxes: ExpandedPath | None = None  # what stands where in the images, for grounding


class Grounding(_Part):
    steps: int = Field(gt=0)
    images_per_step: int = Field(default=64, gt=0)
    learning_rate: float = Field(default=2e-3, gt=0)


class LoRA(_Part):
    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    learning_rate: float = Field(default=2e-4, gt=0)


class Recipe(_Part):
    """Both stages' fields; stage 1 has no `lora` and no `start`, stage 2 no `grounding`."""

    tower: TowerSpec
    base_lm: ExpandedPath
    chat_template: str = "chatml.jinja"  # of basalt/data/templates
    image_token_id: int = Field(ge=0)
    projector_hidden: int = Field(gt=0)
    data: list[DataSource] = Field(min_length=1)
    held_out: DataSource | None = None  # its loss is measured as training goes
    samples: int = Field(default=3, ge=0)  # questions whose answers are shown as training goes, held out if there are
    start: ExpandedPath | None = None  # a stage 1 run, or an assistant's directory, that is trained on
    # Of the assistant trained on, its share in what is published, the rest being what was learned: the mean of both
    # weights forgets less (WiSE-FT, Wortsman et al. 2022).
    keep_start: float = Field(default=0.0, ge=0, lt=1)
    grounding: Grounding | None = None
    lora: LoRA | None = None
    projector_learning_rate: float = Field(gt=0)
    steps: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)  # instead of steps: how often all data is seen
    rows_per_pass: int = Field(gt=0)  # run through the model together; fits memory
    split: int = Field(default=1, gt=0)  # parts that a pass is run in where memory is short: the batch stays the same
    passes_per_step: int = Field(default=1, gt=0)  # whose gradients are added up
    row_length: int = Field(gt=0)  # tokens
    warmup: float = Field(default=0.03, ge=0, lt=1)  # share of steps
    decay: float = Field(default=1.0, gt=0, le=1)  # last share of steps on the cosine; 1.0 is LLaVA-1.5's plain cosine
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    checkpoint_every: int = Field(default=100, gt=0)
    # Of the frozen parts and the arithmetic; masters are float32. A run settles what "auto" means when it begins.
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    quantize: Literal["nf4"] | None = None  # of the frozen base LM: QLoRA, for small GPUs
    recompute: bool = False  # activations in the backward pass (checkpointing): a fifth slower, much less memory
    shard: bool = False  # the frozen base LM over the processes that train together (FSDP2)
    seed: int = 0
    features: ExpandedPath = Path("var/features")  # cache of tower features
    keep_features: bool | None = None  # None decides by their size and how often they are needed

    def total_steps(self, per_epoch: int) -> int:
        """How many steps a run takes, by how many an epoch of its data makes."""
        return self.steps or max(round((self.epochs or 1) * per_epoch), 1)

    @model_validator(mode="after")
    def _one_length(self) -> "Recipe":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give `steps` or `epochs`, one of the two")
        return self


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        RecipeError: no such file, not YAML, or a field that is missing, unknown or out of range.
    """
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"]))) for item in error.errors()]
        raise RecipeError(f"{path}: " + "; ".join(lines)) from error
