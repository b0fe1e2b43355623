"""The trainer's settings, from the environment; its API and its workers read the same."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from basalt.object_store import StoreSettings
from basalt.record.database import RecordSettings

GIBI = 1024**3

KIND = "training"  # of its jobs and their queue


class Settings(StoreSettings, RecordSettings):
    model_config = SettingsConfigDict(env_prefix="BASALT_TRAINER_", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8090, ge=1, le=65535)
    require_key: bool = False  # of requests on loopback too; on any other address they always need one
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", validation_alias="BASALT_REDIS_URL")

    models_dir: Path = Field(default=Path("models"), validation_alias="BASALT_MODELS_DIR")
    versions_dir: Path = Field(default=Path("var/versions"), validation_alias="BASALT_VERSIONS_DIR")
    recipes: Path = Path("recipes")  # RECIPES/NAME/stage1.yaml and stage2.yaml: what a job's `model` may name
    data_root: Path | None = None  # whose files jobs may name by path; without it, only uploaded ones
    work: Path = Path("var/jobs")  # where a worker keeps the runs of its jobs
    features: Path = Path("var/features")  # a worker's cache of tower features
    require_gpu: bool = False  # a worker without one ends at its start instead of training on the CPU
    max_file_bytes: int = Field(default=8 * GIBI, ge=1)

    reconcile_seconds: float = Field(default=10, gt=0)  # between looks for jobs that nobody works on
    stop_seconds: float = Field(default=120, gt=0)  # that a training process has for its step and checkpoint
