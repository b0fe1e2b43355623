"""A plan: everything a training job does, resolved, as its process finds it in its directory.

It holds paths of this machine; what a client asked for is resolved into it by the worker that does the job.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from basalt.train.recipe import Recipe

PLAN, SAID, REFUSAL, PUBLISHED = "plan.json", "said.jsonl", "refusal.json", "published"


class Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["stage1", "stage2"]
    recipe: Recipe


class Plan(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # of the assistant it publishes
    stages: list[Stage] = Field(min_length=1)
    lineage: dict[str, Any]


class Refusal(BaseModel):
    """Why a job cannot be done as it was asked for, in the words of the error that its client sees."""

    code: str
    message: str
    stage: str = ""  # where it was out of memory
