"""The gateway's settings, from the environment."""

from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from basalt.data.images import MAX_PIXELS
from basalt.object_store import StoreSettings
from basalt.record.database import RecordSettings

MEBI = 1024 * 1024


class Settings(StoreSettings, RecordSettings):
    model_config = SettingsConfigDict(env_prefix="BASALT_GATEWAY_", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    vision_address: str = Field(default="127.0.0.1:50051", validation_alias="BASALT_VISION_ADDRESS")
    llm_url: str = Field(default="http://127.0.0.1:8000", validation_alias="BASALT_LLM_URL")

    redis_url: str | None = Field(default=None, validation_alias="BASALT_REDIS_URL")  # for limits that replicas share

    published: str = ""  # the address clients reach this under, where a container engine publishes it; else `host`
    require_key: bool | None = None  # of every request; by default on any address but loopback
    service_key: SecretStr = SecretStr("")  # that Basalt's own services may use: the chat page, the evaluator
    # For each API key that has no limits of its own; without a number there is none.
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    fetches_per_minute: int | None = Field(default=600, ge=1)  # of image URLs
    concurrent_requests: int | None = Field(default=None, ge=1)
    # For all together: what the LLM service answers at the same time, and what waits for its turn, in turns by key.
    max_running: int = Field(default=64, ge=1)
    max_waiting: int = Field(default=512, ge=0)
    wait_seconds: float = Field(default=30, gt=0)
    max_held_bytes: int = Field(default=512 * MEBI, ge=1)  # of request bodies

    max_request_bytes: int = Field(default=32 * MEBI, ge=1)
    max_images: int = Field(default=8, ge=0)  # in one request, earlier turns included
    max_image_bytes: int = Field(default=10 * MEBI, ge=1)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)

    # Hosts, as written in URLs, whose images are fetched although their addresses are private. For development.
    allow_private_hosts: Annotated[frozenset[str], NoDecode] = frozenset()
    # Where given, images of no other hosts are fetched, but of their subdomains. It holds for redirects too.
    allow_hosts: Annotated[frozenset[str], NoDecode] = frozenset()
    fetch_connect_seconds: float = Field(default=5, gt=0)
    fetch_seconds: float = Field(default=15, gt=0)  # for one image URL, redirects included
    fetches_per_host: int = Field(default=8, ge=1)  # at a time
    fetch_cache_bytes: int = Field(default=64 * MEBI, ge=0)  # of images by URL, kept for a minute at most

    # Images are decoded in processes of their own.
    decode_processes: int = Field(default=2, ge=1)
    decode_memory_bytes: int = Field(default=1024 * MEBI, ge=256 * MEBI)  # of each
    decode_seconds: float = Field(default=10, gt=0)  # for one image

    store_seconds: float = Field(default=10, gt=0)  # for the object store to answer

    response_days: float = Field(default=30, gt=0)  # that a stored response is kept after it was last gone on from

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"  # at INFO, one line a request

    body_seconds: float = Field(default=60, gt=0)  # for a client to send its request
    embed_seconds: float = Field(default=30, gt=0)  # for the vision service to answer
    llm_seconds: float = Field(default=300, gt=0)  # of silence from the LLM service
    drain_seconds: int = Field(default=20, ge=0)  # that SIGTERM leaves to running answers

    @field_validator("allow_private_hosts", "allow_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """A comma-separated list."""
        if isinstance(value, str):
            return frozenset(host.strip().lower() for host in value.split(",") if host.strip())
        return value
