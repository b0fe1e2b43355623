"""The vision service's settings, from the environment."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from basalt.handoff import default_directory
from basalt.object_store import StoreSettings

MEBI = 1024 * 1024


class Settings(StoreSettings):
    model_config = SettingsConfigDict(env_prefix="BASALT_VISION_", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)  # 0: any free one
    metrics_port: int | None = Field(default=None, ge=0, le=65535)  # of Prometheus; none where it is not set
    models_dir: Path = Field(default=Path("models"), validation_alias="BASALT_MODELS_DIR")
    versions_dir: Path = Field(default=Path("var/versions"), validation_alias="BASALT_VERSIONS_DIR")

    device: str = "cpu"  # or "cuda", "cuda:1"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the embeddings; on a GPU of the computation too
    torch_threads: int = Field(default=1, ge=1)  # on a CPU
    decode_threads: int = Field(default=2, ge=1)

    max_batch_tokens: int | None = Field(default=None, ge=1)  # in one pass of the tower
    batch_wait_ms: float = Field(default=0, ge=0)  # how long an idle tower waits for company
    queue_size: int = Field(default=64, ge=1)  # requests being decoded, waiting or computed; more are refused
    max_seconds: float = Field(default=60, gt=0)  # a request without a deadline gets this one
    drain_seconds: float = Field(default=20, ge=0)  # that SIGTERM leaves to running requests

    max_image_bytes: int = Field(default=20 * MEBI, ge=1)
    max_pixels: int = Field(default=40_000_000, ge=1)
    feature_cache_bytes: int = Field(default=128 * MEBI, ge=0)  # tower features, shared by all assistants
    projector_bytes: int = Field(default=512 * MEBI, ge=0)  # of projectors kept loaded
    # Embeddings on the way to the LLM service and kept for the next question, in memory shared with it.
    handoff_dir: Path = Field(default_factory=default_directory, validation_alias="BASALT_HANDOFF_DIR")
    embedding_cache_bytes: int = Field(default=256 * MEBI, ge=0)
    # Embeddings in Redis, shared by all replicas; without a URL there are none.
    redis_url: str | None = Field(default=None, validation_alias="BASALT_REDIS_URL")
    shared_cache_bytes: int = Field(default=512 * MEBI, ge=0)

    @property
    def batch_tokens(self) -> int:
        """On a CPU still larger batches are no faster, and whoever waits for one waits for all of it."""
        return self.max_batch_tokens or (2304 if self.device == "cpu" else 16384)
