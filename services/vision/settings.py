"""The vision service's settings, from the environment."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from basalt.object_store import StoreSettings

MEBI = 1024 * 1024


class Settings(StoreSettings):
    model_config = SettingsConfigDict(env_prefix="BASALT_VISION_", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)  # 0: any free one
    models_dir: Path = Field(default=Path("models"), validation_alias="BASALT_MODELS_DIR")

    device: str = "cpu"  # or "cuda", "cuda:1"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the embeddings; on a GPU of the computation too
    torch_threads: int = Field(default=1, ge=1)  # on a CPU
    decode_threads: int = Field(default=2, ge=1)

    max_batch: int = Field(default=8, ge=1)  # images in one pass of the tower
    batch_wait_ms: float = Field(default=4, ge=0)  # how long an idle tower waits for company
    queue_size: int = Field(default=64, ge=1)  # requests being decoded, waiting or computed; more are refused
    max_seconds: float = Field(default=60, gt=0)  # a request without a deadline gets this one
    drain_seconds: float = Field(default=20, ge=0)  # that SIGTERM leaves to running requests

    max_image_bytes: int = Field(default=20 * MEBI, ge=1)
    max_pixels: int = Field(default=40_000_000, ge=1)
    feature_cache_bytes: int = Field(default=128 * MEBI, ge=0)  # tower features, shared by all assistants
    embedding_cache_bytes: int = Field(default=64 * MEBI, ge=0)
