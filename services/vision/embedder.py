"""From image bytes to visual tokens: decode, tower (batched, once for all assistants), projector."""

import asyncio
import contextvars
import enum
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from basalt import tracing
from basalt.assistants import Assistant, TowerSpec, sha256
from basalt.caching import ByteLRU
from basalt.catalog import Catalog
from basalt.data.images import ImageError, decode_image
from basalt.flights import SingleFlight
from basalt.handoff import Blob, HandoffDirectory
from basalt.model.precision import fast_bfloat16
from basalt.model.projector import Projector, load_projector
from basalt.model.vision_encoder import VisionEncoder, load_vision_encoder
from basalt.object_store import ObjectNotFound, ObjectStore, image_id_of_key, image_key
from services.vision import metrics
from services.vision.batcher import Batcher
from services.vision.settings import Settings
from services.vision.shared_cache import SharedCache

T = TypeVar("T")


class QueueFull(Exception):
    """As many requests as the settings allow are being worked on."""


class Cached(enum.Enum):
    """The furthest of what was there already for a request."""

    NOTHING = "nothing"
    FEATURES = "features"
    EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class Embedding:
    """Visual tokens of one image for one assistant.

    Attributes:
        digest: sha256:… over image id, assistant version and dtype.
        handed_off: the hand-off directory holds them under their digest.
    """

    blob: Blob
    digest: str
    image_id: str
    cached: Cached
    handed_off: bool


Pixels = tuple[Tensor, tracing.Span]  # [3, S, S], and what waits for them


@dataclass(frozen=True)
class _Tower:
    encoder: VisionEncoder
    batcher: Batcher[Pixels, Tensor]


class Embedder:
    """Every assistant's projector over the towers they share. Use from one event loop; `close` at the end."""

    def __init__(self, catalog: Catalog, store: ObjectStore, settings: Settings) -> None:
        self.catalog = catalog
        self._store = store
        self._settings = settings
        self._busy = 0  # requests admitted and not answered yet
        self._near = HandoffDirectory(settings.handoff_dir, settings.embedding_cache_bytes)
        self._far = SharedCache(settings.redis_url, settings.shared_cache_bytes) if settings.redis_url else None
        self._features: ByteLRU[tuple[str, str], Tensor] = ByteLRU(settings.feature_cache_bytes)
        self._projectors: ByteLRU[str, Projector] = ByteLRU(settings.projector_bytes)
        self._towers: dict[str, _Tower] = {}
        self._loading: SingleFlight[str, _Tower] = SingleFlight()
        self._computing: SingleFlight[tuple[str, str], Tensor] = SingleFlight()
        self._embedding: SingleFlight[str, tuple[Blob, Cached, bool]] = SingleFlight()
        self._storing: set[asyncio.Task[None]] = set()
        # One worker: torch parallelises inside an operation, and two of them would only share the cores.
        self._torch_worker = ThreadPoolExecutor(1, "torch")
        self._threads = ThreadPoolExecutor(settings.decode_threads, "decode")

    def load(self) -> None:
        """Loads what the assistants of the models directory need, so that their first requests need not wait.

        Raises:
            AssistantError, ValueError, OSError: weights are missing or do not fit their manifest.
        """
        for assistant in self.catalog.local.values():
            key = tower_id(assistant.manifest.tower)
            if key not in self._towers:
                self._towers[key] = self._load_tower(assistant.manifest.tower)
            self._load_projector(assistant)

    async def close(self) -> None:
        if self._far is not None:
            await asyncio.gather(*self._storing, return_exceptions=True)
            await self._far.close()
        self._threads.shutdown(cancel_futures=True)
        self._torch_worker.shutdown(cancel_futures=True)

    async def embed_bytes(self, assistant: str, data: bytes, deadline: float) -> Embedding:
        """Visual tokens of an image given by its bytes. `deadline` is by the event loop's clock.

        Raises:
            UnknownAssistant, AssistantError, StoreUnavailable: of the assistant.
            ImageError, QueueFull.
        """
        found = await self.catalog.find(assistant)
        if len(data) > self._settings.max_image_bytes:
            raise ImageError(
                f"the image has {len(data):,} bytes, more than the {self._settings.max_image_bytes:,} allowed"
            )
        return await self._embed(found, await self._off_loop(sha256, data), data, deadline)

    async def embed_object(self, assistant: str, key: str, deadline: float) -> Embedding:
        """Visual tokens of an image given by its key in the object store, which is read only when needed.

        Raises:
            UnknownAssistant, AssistantError: of the assistant.
            ImageError, QueueFull.
            InvalidKey: not an image's key.
            ObjectNotFound: no such object.
            StoreUnavailable: the store cannot be read.
        """
        found = await self.catalog.find(assistant)
        return await self._embed(found, image_id_of_key(key), None, deadline)

    async def _embed(self, assistant: Assistant, image_id: str, data: bytes | None, deadline: float) -> Embedding:
        """`data` is None where the image is in the object store."""
        digest = sha256("\n".join((image_id, assistant.version, self._settings.dtype)).encode())
        with tracing.span("look_up") as span:
            known = self._near.get(digest)
            span.told(found=known is not None)
        if known is not None:
            found = known, Cached.EMBEDDINGS, True
        elif self._busy >= self._settings.queue_size:
            raise QueueFull(f"{self._busy} requests are being worked on already")
        else:
            self._busy += 1
            metrics.BUSY.set(self._busy)
            try:
                found = await self._embedding.run(
                    digest, lambda: self._find_or_compute(assistant, digest, image_id, data, deadline)
                )
            finally:
                self._busy -= 1
                metrics.BUSY.set(self._busy)
        blob, cached, handed_off = found
        metrics.IMAGES.labels(assistant.name, cached.value).inc()
        return Embedding(blob, digest, image_id, cached, handed_off)

    async def _find_or_compute(
        self, assistant: Assistant, digest: str, image_id: str, data: bytes | None, deadline: float
    ) -> tuple[Blob, Cached, bool]:
        blob = await self._look_up_far(self._far, digest) if self._far else None
        if blob is not None:
            return blob, Cached.EMBEDDINGS, self._near.put(digest, blob)
        key = tower_id(assistant.manifest.tower)
        features = self._features.get((image_id, key))
        cached = Cached.NOTHING if features is None else Cached.FEATURES
        if features is None:
            tower = self._towers.get(key) or await self._loading.run(key, lambda: self._tower(assistant))
            features = await self._computing.run(
                (image_id, key), lambda: self._compute(key, tower, image_id, data, deadline)
            )
        loop = asyncio.get_running_loop()
        within = contextvars.copy_context()
        blob = await loop.run_in_executor(self._torch_worker, lambda: within.run(self._project, assistant, features))
        with timed("hand_off"):
            handed_off = self._near.put(digest, blob)
        if self._far is not None:
            storing = asyncio.create_task(self._far.put(digest, blob))
            self._storing.add(storing)
            storing.add_done_callback(self._storing.discard)
        return blob, cached, handed_off

    async def _look_up_far(self, far: SharedCache, digest: str) -> Blob | None:
        with timed("shared_cache"):
            return await far.get(digest)

    async def _compute(self, key: str, tower: _Tower, image_id: str, data: bytes | None, deadline: float) -> Tensor:
        """Bytes → features `[tokens, tower_dim]`, on the tower's device."""
        with timed("read"):
            data = await self._read(image_id) if data is None else data
        with timed("decode"):
            pixels = await self._off_loop(self._decode, tower.encoder, data)
        with timed("queue_and_tower"):
            features = await tower.batcher.submit((pixels, tracing.current()), deadline)
        self._features.put((image_id, key), features, features.nbytes)
        return features

    async def _read(self, image_id: str) -> bytes:
        key = image_key(image_id)
        data = await self._store.get(key)
        if await self._off_loop(sha256, data) != image_id:
            raise ObjectNotFound(f"{key} is damaged: its bytes do not have the digest of its key")
        return data

    def _decode(self, tower: VisionEncoder, data: bytes) -> Tensor:
        """Bytes → normalised pixels `[3, S, S]`."""
        image = decode_image(data, max_pixels=self._settings.max_pixels)
        try:
            return tower.preprocess(image)
        except (ValueError, ZeroDivisionError, MemoryError):  # a shape no resizing can make a square of
            raise ImageError(f"an image of {image.width} × {image.height} pixels cannot be made a square") from None

    async def _tower(self, assistant: Assistant) -> _Tower:
        """A tower that none of the assistants loaded at the start has."""
        spec = assistant.manifest.tower
        loaded = await asyncio.get_running_loop().run_in_executor(self._torch_worker, self._load_tower, spec)
        self._towers[tower_id(spec)] = loaded
        return loaded

    def _load_tower(self, spec: TowerSpec) -> _Tower:
        encoder = load_vision_encoder(spec).to(self._settings.device, self._tower_dtype(spec))
        batcher: Batcher[Pixels, Tensor] = Batcher(
            lambda batch: self._run_tower(encoder, batch),
            self._torch_worker,
            max_batch=max(1, self._settings.batch_tokens // spec.tokens),
            wait_seconds=self._settings.batch_wait_ms / 1000,
        )
        return _Tower(encoder, batcher)

    def _tower_dtype(self, spec: TowerSpec) -> torch.dtype:
        """On a CPU bfloat16 only where it is the faster: in transformers' matrix products, by its own instructions."""
        device = torch.device(self._settings.device)
        faster = fast_bfloat16(device) and not (device.type == "cpu" and spec.kind == "efficientnet-lite")
        return getattr(torch, self._settings.dtype) if faster else torch.float32

    def _load_projector(self, assistant: Assistant) -> Projector:
        loaded = self._projectors.get(assistant.version)
        if loaded is None:
            loaded = load_projector(assistant).to(self._settings.device, self._tower_dtype(assistant.manifest.tower))
            size = sum(value.nbytes for value in loaded.parameters())
            self._projectors.put(assistant.version, loaded, size)
            metrics.PROJECTORS.set(len(self._projectors))
        return loaded

    def _run_tower(self, tower: VisionEncoder, batch: Sequence[Pixels]) -> Sequence[Tensor]:
        """`[3, S, S]` each → `[tokens, tower_dim]` each, of their own memory so that a cache may keep one alone."""
        with ExitStack() as spans, observed("tower"), torch.inference_mode():
            for _, waiting in batch:
                spans.enter_context(tracing.span("tower", parent=waiting, batch=len(batch)))
            features = tower(torch.stack([pixels for pixels, _ in batch]))
        metrics.BATCH.observe(len(batch))
        return [one.clone() for one in features]

    def _project(self, assistant: Assistant, features: Tensor) -> Blob:
        """`[tokens, tower_dim]` → `[tokens, lm_dim]` in the output dtype."""
        projector = self._load_projector(assistant)
        with timed("projector"), torch.inference_mode():
            tokens: Tensor = projector(features)
            tokens = tokens.to("cpu", getattr(torch, self._settings.dtype)).contiguous()
        shape = (tokens.shape[0], tokens.shape[1])
        return Blob(memoryview(tokens.view(torch.uint8).numpy().reshape(-1).data), shape, self._settings.dtype)

    async def _off_loop(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Times a stage of the current request, and makes a span of it."""
    with tracing.span(stage), observed(stage):
        yield


@contextmanager
def observed(stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    metrics.STAGE.labels(stage).observe(time.perf_counter() - began)


def tower_id(spec: TowerSpec) -> str:
    """Tower and preprocessing by digest: assistants that agree on it share features."""
    return sha256(spec.model_dump_json().encode())
