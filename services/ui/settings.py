"""The chat page's settings, from the environment."""

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="BASALT_UI_", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8501, ge=1, le=65535)
    gateway_url: str = Field(default="http://127.0.0.1:8080", validation_alias="BASALT_GATEWAY_URL")
    gateway_key: SecretStr = SecretStr("")  # the API key, where the gateway wants one
    max_image_mb: int = Field(default=10, ge=1)  # of one attached file; the gateway has the last word
