import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch

from basalt.catalog import Catalog
from basalt.object_store import DirectoryStore
from basalt.rpc.vision.v1 import vision_pb2_grpc
from services.vision.embedder import Embedder
from services.vision.server import VisionServer
from services.vision.settings import Settings
from tests.tiny import make_assistant, make_tower


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two assistants, `one` and `two`, over the same tower."""
    root = tmp_path_factory.mktemp("vision")
    tower = make_tower(root / "tower")
    make_assistant(root / "models", "one", tower, seed=1)
    make_assistant(root / "models", "two", tower, seed=2)
    return root / "models"


@dataclass
class Vision:
    """A listening vision server and what is behind it."""

    address: str
    channel: grpc.aio.Channel
    stub: vision_pb2_grpc.VisionStub
    server: VisionServer
    embedder: Embedder
    store: DirectoryStore
    settings: Settings
    batches: list[int]  # sizes of the tower's batches so far


Start = Callable[..., Awaitable[Vision]]


@pytest_asyncio.fixture
async def start(models: Path, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts vision servers with given settings; they are stopped at the end."""
    running: list[Vision] = []

    async def start_server(**given: Any) -> Vision:
        defaults = {"port": 0, "dtype": "float32", "drain_seconds": 5, "host": "127.0.0.1"}
        places = {"BASALT_MODELS_DIR": models, "BASALT_VERSIONS_DIR": tmp_path / "versions"}
        places["BASALT_HANDOFF_DIR"] = tmp_path / f"handoff-{len(running)}"
        settings = Settings(**places | defaults | given)
        torch.set_num_threads(1)
        store = DirectoryStore(tmp_path / "objects")
        embedder = Embedder(Catalog(settings.models_dir, settings.versions_dir, store), store, settings)
        embedder.load()
        batches: list[int] = []
        for tower in embedder._towers.values():
            tower.encoder.register_forward_pre_hook(lambda _, pixels: batches.append(len(pixels[0])))
        server = VisionServer(embedder, settings)
        address = f"127.0.0.1:{await server.start()}"
        channel = grpc.aio.insecure_channel(address, [("grpc.max_send_message_length", 64 << 20)])
        vision = Vision(
            address, channel, vision_pb2_grpc.VisionStub(channel), server, embedder, store, settings, batches
        )
        running.append(vision)
        return vision

    yield start_server
    for vision in running:
        await vision.channel.close()
        await vision.server.stop()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
