"""OpenAI's files and fine-tuning jobs as they go over HTTP. What is ours besides is said where it stands."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from basalt.record.jobs import Checkpoint, Event, Job

RECIPES = "recipes"  # of a job's record: those it was accepted with, by stage; files of the server may change since
StageName = Literal["stage1", "stage2"]
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataSpec(_Request):
    """One data set of a stage: `file-…` ids of uploaded files, or paths under the trainer's data root."""

    rows: str
    images: str | None = None
    boxes: str | None = None
    weight: float = Field(default=1.0, gt=0)
    prompts: list[str] | None = None


class Hyperparameters(BaseModel):
    """OpenAI's three, and any field of a recipe by its name (`lora`, `projector_learning_rate`, `seed`, …)."""

    model_config = ConfigDict(extra="allow")

    n_epochs: float | Literal["auto"] = "auto"  # "auto": one, as LLaVA-1.5
    batch_size: int | Literal["auto"] = "auto"  # rows of packed conversations in a step
    learning_rate_multiplier: float | Literal["auto"] = "auto"


class StageSpec(_Request):
    hyperparameters: Hyperparameters = Hyperparameters()
    data: list[DataSpec] = []  # beside or instead of `training_file`


class Method(_Request):
    """`supervised` and `two_stage` are both stages in a row."""

    type: Literal["supervised", "two_stage", "stage1", "stage2"] = "two_stage"
    supervised: StageSpec = StageSpec()
    stage1: StageSpec = StageSpec()
    stage2: StageSpec = StageSpec()

    def stages(self) -> list[tuple[StageName, StageSpec]]:
        """What is to be done, in order."""
        if self.type == "supervised":
            return [("stage1", self.supervised), ("stage2", self.supervised)]
        wanted = ("stage1", "stage2") if self.type == "two_stage" else (self.type,)
        return [("stage1", self.stage1) if name == "stage1" else ("stage2", self.stage2) for name in wanted]


class JobRequest(_Request):
    """`POST /v1/fine_tuning/jobs`."""

    model: str  # a recipe's name
    training_file: str | None = None
    images_file: str | None = None  # ours: the tar of pictures that the rows of `training_file` name
    validation_file: str | None = None
    method: Method = Method()
    hyperparameters: Hyperparameters | None = None  # OpenAI's older place for them
    # Ours, for stage2 alone: the stage 1 job whose projector is trained on, or an assistant, NAME[@ALIAS|@VERSION], of
    # which projector and LoRA are. A job keeps the version that was meant as it was submitted.
    start: str | None = None
    suffix: str | None = Field(default=None, pattern=NAME)  # the assistant's name; the job's id without one
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = None

    def with_steps(self, stage: StageName, steps: int) -> "JobRequest":
        """The same with another number of steps for one stage."""
        specs = dict(self.method.stages())
        chosen = specs[stage].hyperparameters.model_dump(exclude={"epochs"}) | {"steps": steps}
        specs[stage] = StageSpec(hyperparameters=Hyperparameters.model_validate(chosen), data=specs[stage].data)
        kind = "two_stage" if self.method.type == "supervised" else self.method.type
        return self.model_copy(update={"method": Method(type=kind, **specs)})


class Steps(_Request):
    steps: int = Field(ge=1)  # in all, those done counted in


class StageEnd(_Request):
    hyperparameters: Steps


class ResumeRequest(_Request):
    """`POST …/resume`, where a stage is to end at another step; said as in `method`."""

    stage1: StageEnd | None = None
    stage2: StageEnd | None = None

    def ends(self) -> dict[StageName, int]:
        named: dict[StageName, StageEnd | None] = {"stage1": self.stage1, "stage2": self.stage2}
        return {name: end.hyperparameters.steps for name, end in named.items() if end is not None}


def request_of(job: Job) -> JobRequest:
    """What was asked for, without the recipes that are kept beside it."""
    return JobRequest.model_validate({name: value for name, value in job.request.items() if name != RECIPES})


def job_object(job: Job) -> dict[str, Any]:
    request, result = job.request, job.result or {}
    method = request["method"]
    stage = method[method["type"] if method["type"] != "two_stage" else "stage2"]
    told = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"} | stage["hyperparameters"]
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "model": request["model"],
        "fine_tuned_model": result.get("model"),
        "organization_id": "basalt",
        "result_files": result.get("files", []),
        "status": job.status,
        "training_file": request["training_file"] or "",
        "validation_file": request["validation_file"],
        "hyperparameters": {name: told[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")},
        "method": method,
        "trained_tokens": result.get("trained_tokens"),
        "error": job.error or {"code": None, "message": None, "param": None},
        "user_provided_suffix": request["suffix"],
        "seed": request["seed"] or 0,
        "estimated_finish": job.progress.get("estimated_finish"),
        "integrations": [],
        "metadata": request["metadata"],
        "progress": job.progress,  # ours: stage, step, steps and its latest figures
    }


def event_object(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data or {},
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    """`fine_tuned_model_checkpoint` names the checkpoint in the object store: it is not served as it is."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuning_job_id": checkpoint.job_id,
        "fine_tuned_model_checkpoint": checkpoint.key,
        "step_number": checkpoint.step,
        "metrics": checkpoint.metrics,
        "stage": checkpoint.stage,  # ours
    }
