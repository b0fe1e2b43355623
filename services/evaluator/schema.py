"""OpenAI's evals and their runs as they go over HTTP. What is ours besides is said where it stands."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from basalt.record.evals import Eval
from basalt.record.jobs import Event, Job
from services.evaluator.settings import GATEWAY

STATUS = {
    "queued": "queued",
    "validating_files": "in_progress",
    "running": "in_progress",
    "paused": "queued",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "canceled",
}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataSource(_Request):
    """Ours: a benchmark's published file. `file-…` is an uploaded file; else a path under the evaluator's data root,
    or a key under `benchmarks/` in the object store."""

    type: Literal["benchmark"] = "benchmark"
    benchmark: str
    data: str
    images: str | None = None  # the folder or tar of its pictures, where they are not in the file


class JudgeSpec(_Request):
    """Ours: the model that grades MM-Vet's answers."""

    type: Literal["judge"] = "judge"
    model: str
    endpoint: str = GATEWAY
    runs: int = Field(default=1, ge=1, le=10)
    calibration: str | None = None  # named as data is; `basalt eval calibrate` makes it


class SamplingParams(BaseModel):
    """Fields of the chat request that change greedy decoding: OpenAI's, and whatever the server takes besides."""

    model_config = ConfigDict(extra="allow")


class Price(_Request):
    """Ours: dollars for a million tokens."""

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)


class Completions(_Request):
    """Who is asked, and how."""

    type: Literal["completions"] = "completions"
    model: str
    sampling_params: SamplingParams = SamplingParams()
    endpoint: str = GATEWAY  # ours: one of the servers in the evaluator's settings
    blind: bool = False  # ours: show no picture
    limit: int | None = Field(default=None, ge=1)  # ours: so many samples alone
    price: Price | None = None


class RunRequest(_Request):
    """`POST /v1/evals/{eval_id}/runs`."""

    data_source: Completions
    name: str | None = None
    metadata: dict[str, str] | None = None


class EvalRequest(_Request):
    """`POST /v1/evals`. `run` is ours: the first run, with the same request."""

    data_source_config: DataSource
    testing_criteria: list[JudgeSpec] = Field(default=[], max_length=1)
    name: str | None = None
    metadata: dict[str, str] | None = None
    run: RunRequest | None = None


def eval_object(found: Eval) -> dict[str, Any]:
    request = found.request
    return {
        "id": found.id,
        "object": "eval",
        "created_at": int(found.created_at),
        "name": request["name"] or request["data_source_config"]["benchmark"],
        "data_source_config": request["data_source_config"],
        "testing_criteria": request["testing_criteria"],
        "metadata": request["metadata"] or {},
    }


def run_object(job: Job) -> dict[str, Any]:
    request, progress, result = job.request, job.progress, job.result or {}
    model = request["data_source"]["model"]
    asking = progress.get("asking", {})
    usage = {
        "model_name": model,
        "invocation_count": asking.get("asked", 0),
        "prompt_tokens": asking.get("prompt_tokens", 0),
        "completion_tokens": asking.get("completion_tokens", 0),
        "total_tokens": asking.get("prompt_tokens", 0) + asking.get("completion_tokens", 0),
        "cached_tokens": 0,
    }
    return {
        "id": job.id,
        "object": "eval.run",
        "eval_id": request["eval"],
        "created_at": int(job.created_at),
        "status": STATUS[job.status],
        "name": request["name"] or model,
        "model": model,
        "data_source": request["data_source"],
        "report_url": f"/v1/evals/{request['eval']}/runs/{job.id}/files",
        "result_counts": result.get("counts", {"total": 0, "errored": 0, "failed": 0, "passed": 0}),
        "per_model_usage": [usage],
        "per_testing_criteria_results": [],
        "error": job.error or {"code": "", "message": ""},
        "metadata": request["metadata"] or {},
        "progress": progress,  # ours: of asking and judging, how far they are, what they cost, what went wrong
        "scores": result.get("scores"),  # ours: as in scores.json, less the single groups and rules
    }


def event_object(event: Event) -> dict[str, Any]:
    """Ours; it looks like that of a fine-tuning job."""
    return {
        "id": f"evalevent-{event.number}",
        "object": "eval.run.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data or {},
    }
