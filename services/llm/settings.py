"""The LLM service's settings, from the environment."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from basalt.handoff import default_directory
from basalt.object_store import StoreSettings


class Settings(StoreSettings):
    model_config = SettingsConfigDict(env_prefix="BASALT_LLM_", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    models_dir: Path = Field(default=Path("models"), validation_alias="BASALT_MODELS_DIR")
    base_lm_dir: Path = Field(default=Path("var/base/smollm2-135m-instruct"), validation_alias="BASALT_BASE_LM_DIR")
    versions_dir: Path = Field(default=Path("var/versions"), validation_alias="BASALT_VERSIONS_DIR")
    # Where embeddings lie that come by reference.
    handoff_dir: Path = Field(default_factory=default_directory, validation_alias="BASALT_HANDOFF_DIR")

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # bfloat16 where the device has instructions for it
    max_model_len: int | None = Field(default=None, ge=1)  # tokens; the assistants' own context where not given
    kv_cache_gib: int = Field(default=1, ge=1)  # on a CPU
    block_size: int = Field(default=32, ge=16)  # tokens; what is reused of earlier prompts is whole blocks
    max_sequences: int = Field(default=32, ge=1)  # answered at the same time
    max_batch_tokens: int = Field(default=2048, ge=1)  # in one engine step
    max_loras: int = Field(default=8, ge=1)  # different LoRAs in one batch
    max_kept_loras: int = Field(default=64, ge=1)  # in memory; of others the least recently used is loaded again
    max_lora_rank: int = Field(default=16, ge=1, le=512)  # raised to that of the models directory's assistants
    # Of requests that name none. Small LMs wander off at OpenAI's 1.0; above 0, so that `n` answers can differ.
    temperature: float = Field(default=0.1, ge=0)
    # vLLM's, that reads tool calls in answers. With this one, templates that write no tools have them written.
    tool_parser: str = "hermes"
    eager: bool = False  # no CUDA graphs: starts faster, answers slower; a CPU has none anyway
    drain_seconds: int = Field(default=20, ge=0)  # that SIGTERM leaves to running answers
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"  # of vLLM
