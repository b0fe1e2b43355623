"""A real gateway under uvicorn, a real vision service over a tiny tower, and a server of the LLM's shape."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from basalt.catalog import Catalog
from basalt.object_store import DirectoryStore
from services.gateway.app import create_app
from services.gateway.settings import Settings
from services.vision.embedder import Embedder
from services.vision.server import VisionServer
from services.vision.settings import Settings as VisionSettings
from tests.gateway.llm_shaped import LLMShaped
from tests.tiny import make_assistant, make_tower


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Served:
    """An ASGI application under uvicorn in a thread, on a port that stays its own."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(
            self.app, host="127.0.0.1", port=self.port, log_level="critical", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


class ServedVision:
    """A vision service in a thread with an event loop of its own."""

    def __init__(self, models: Path, store: Path) -> None:
        self.models = models
        self.store = store
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(120)

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        torch.set_num_threads(1)
        root = self.store.parent
        places = {"BASALT_MODELS_DIR": self.models, "BASALT_VERSIONS_DIR": root / "versions"}
        settings = VisionSettings(
            port=self.port, dtype="float32", drain_seconds=1, **places, BASALT_HANDOFF_DIR=root / "handoff"
        )
        store = DirectoryStore(self.store)
        embedder = Embedder(Catalog(settings.models_dir, settings.versions_dir, store), store, settings)
        embedder.load()
        server = VisionServer(embedder, settings)
        await server.start()
        ready.set()
        await self._stopping.wait()
        await server.stop()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()


@dataclass
class Stack:
    url: str
    objects: Path  # the gateway's object store
    models: Path
    vision: ServedVision
    llm: LLMShaped
    llm_server: Served

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=120)

    def post(self, body: object = None, *, raw: bytes | None = None) -> httpx.Response:
        content = {"content": raw} if raw is not None else {"json": body}
        return httpx.post(self.url + "/v1/chat/completions", timeout=120, trust_env=False, **content)

    def ask(self, content: object, **fields: object) -> httpx.Response:
        return self.post({"model": "one", "messages": [{"role": "user", "content": content}]} | fields)


@pytest.fixture(scope="session")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServedVision, LLMShaped, Served]]:
    root = tmp_path_factory.mktemp("gateway")
    tower = make_tower(root / "tower")
    make_assistant(root / "models", "one", tower, seed=1)
    make_assistant(root / "models", "two", tower, seed=2)
    vision = ServedVision(root / "models", root / "objects")
    llm = LLMShaped()
    server = Served(llm.app())
    yield vision, llm, server
    vision.stop()
    server.stop()


@pytest.fixture(scope="module")
def start(behind: tuple[ServedVision, LLMShaped, Served]) -> Iterator[Callable[..., Stack]]:
    """Starts gateways with given settings; they are stopped at the end."""
    vision, llm, llm_server = behind
    running: list[Served] = []

    def start_gateway(**given: Any) -> Stack:
        defaults = {
            "BASALT_VISION_ADDRESS": vision.address,
            "BASALT_LLM_URL": llm_server.url,
            "BASALT_STORE": str(vision.store),
            "BASALT_DATABASE": f"sqlite:///{vision.store.parent / 'basalt.db'}",
            "allow_private_hosts": "127.0.0.1",
            "fetch_connect_seconds": 30,
            "fetch_seconds": 60,
        }
        settings = Settings(**defaults | given)
        served = Served(create_app(settings))
        running.append(served)
        return Stack(served.url, Path(settings.store), vision.models, vision, llm, llm_server)

    yield start_gateway
    for served in running:
        served.stop()


@pytest.fixture(scope="module")
def stack(start: Callable[..., Stack]) -> Stack:
    return start(max_images=3, max_image_bytes=50_000, max_pixels=20_000, max_request_bytes=400_000)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
