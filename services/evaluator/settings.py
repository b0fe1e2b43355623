"""The evaluator's settings, from the environment; its API and its workers read the same."""

from pathlib import Path

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import SettingsConfigDict

from basalt.eval.endpoint import Endpoint
from basalt.object_store import StoreSettings
from basalt.record.database import RecordSettings

GATEWAY = "gateway"  # the endpoint that is asked where a request names none


class Server(BaseModel):
    """An OpenAI-compatible server that may be asked."""

    url: str  # with its /v1
    key: SecretStr = SecretStr("")


class Settings(StoreSettings, RecordSettings):
    model_config = SettingsConfigDict(env_prefix="BASALT_EVALUATOR_", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8091, ge=1, le=65535)
    require_key: bool = False  # of requests on loopback too; on any other address they always need one
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", validation_alias="BASALT_REDIS_URL")

    gateway_url: str = Field(default="http://127.0.0.1:8080", validation_alias="BASALT_GATEWAY_URL")
    gateway_key: SecretStr = SecretStr("")
    endpoints: dict[str, Server] = Field(default={})  # others by name, for assistants elsewhere and for judges; JSON
    answer_seconds: float = Field(default=120, gt=0)  # for one answer
    concurrency: int = Field(default=128, ge=1)  # requests at once at most; how many is found out

    data_root: Path | None = None  # whose files evals may name by path
    work: Path = Path("var/eval/runs")  # where a worker keeps the directories of its runs
    retry_seconds: float = Field(default=15, ge=0)  # before a run whose server does not answer is tried again; doubles
    reconcile_seconds: float = Field(default=10, gt=0)  # between looks for runs that nobody works on

    def endpoint(self, name: str, model: str) -> Endpoint:
        """A model at one of the servers.

        Raises:
            KeyError: there is no server of this name.
        """
        gateway = Server(url=f"{self.gateway_url.rstrip('/')}/v1", key=self.gateway_key)
        server = ({GATEWAY: gateway} | self.endpoints)[name]
        return Endpoint(server.url, model, server.key.get_secret_value(), self.answer_seconds)
