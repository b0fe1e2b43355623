"""From image bytes to visual tokens: decode, tower (batched, once for all assistants), projector."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from basalt.assistants import Assistant, TowerSpec, sha256
from basalt.data.images import ImageError, decode_image
from basalt.model.projector import Projector, load_projector
from basalt.model.vision_encoder import VisionEncoder, load_vision_encoder
from basalt.object_store import ObjectNotFound, ObjectStore, image_id_of_key, image_key
from services.vision.batcher import Batcher
from services.vision.caching import ByteLRU, SingleFlight
from services.vision.settings import Settings

T = TypeVar("T")


class UnknownAssistant(Exception):
    """This replica does not serve the assistant; the message names those it does."""


class QueueFull(Exception):
    """As many requests as the settings allow are being worked on."""


@dataclass(frozen=True)
class Embedding:
    """Visual tokens of one image for one assistant, as bytes.

    Attributes:
        data: row-major little-endian values.
        shape: (tokens, lm_dim).
        digest: sha256:… over image id, assistant version and dtype.
        cache_hit: the tower did not have to run for this request.
    """

    data: bytes
    shape: tuple[int, int]
    dtype: str
    digest: str
    image_id: str
    cache_hit: bool


class Embedder:
    """Every assistant's projector over the towers they share. Use from one event loop; `close` at the end.

    Args:
        towers: by `tower_id`.
        projectors: by assistant.
    """

    def __init__(
        self,
        assistants: Mapping[str, Assistant],
        towers: Mapping[str, VisionEncoder],
        projectors: Mapping[str, Projector],
        store: ObjectStore,
        settings: Settings,
    ) -> None:
        self.assistants = assistants
        self._projectors = projectors
        self._store = store
        self._settings = settings
        self._busy = 0  # requests admitted and not answered yet
        self._embeddings: ByteLRU[str, Embedding] = ByteLRU(settings.embedding_cache_bytes)
        self._features: ByteLRU[tuple[str, str], Tensor] = ByteLRU(settings.feature_cache_bytes)
        self._flights: SingleFlight[tuple[str, str], Tensor] = SingleFlight()
        self._towers = towers
        # One worker: torch parallelises inside an operation, and two of them would only share the cores.
        self._torch_worker = ThreadPoolExecutor(1, "torch")
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._batchers: dict[str, Batcher[Tensor, Tensor]] = {
            tower_id: Batcher(
                lambda pixels, tower=tower: self._run_tower(tower, pixels),
                self._torch_worker,
                max_batch=settings.max_batch,
                wait_seconds=settings.batch_wait_ms / 1000,
            )
            for tower_id, tower in towers.items()
        }

    @classmethod
    def load(cls, assistants: Mapping[str, Assistant], store: ObjectStore, settings: Settings) -> "Embedder":
        """Loads each distinct tower once and every projector.

        Raises:
            AssistantError, ValueError, OSError: weights are missing or do not fit their manifest.
        """
        specs = {tower_id(a.manifest.tower): a.manifest.tower for a in assistants.values()}
        on_cpu = torch.device(settings.device).type == "cpu"
        dtype = torch.float32 if on_cpu else getattr(torch, settings.dtype)
        towers = {key: load_vision_encoder(spec).to(settings.device, dtype) for key, spec in specs.items()}
        projectors = {name: load_projector(a).to(settings.device, dtype) for name, a in assistants.items()}
        return cls(assistants, towers, projectors, store, settings)

    def close(self) -> None:
        self._decoders.shutdown(cancel_futures=True)
        self._torch_worker.shutdown(cancel_futures=True)

    async def embed_bytes(self, assistant: str, data: bytes) -> Embedding:
        """Visual tokens of an image given by its bytes.

        Raises:
            UnknownAssistant, ImageError, QueueFull.
        """
        self._check_assistant(assistant)
        if len(data) > self._settings.max_image_bytes:
            raise ImageError(
                f"the image has {len(data):,} bytes, more than the {self._settings.max_image_bytes:,} allowed"
            )
        return await self._embed(assistant, await self._off_loop(sha256, data), data)

    async def embed_object(self, assistant: str, key: str) -> Embedding:
        """Visual tokens of an image given by its key in the object store, which is read only when needed.

        Raises:
            UnknownAssistant, ImageError, QueueFull.
            InvalidKey: not an image's key.
            ObjectNotFound: no such object.
            StoreUnavailable: the store cannot be read.
        """
        self._check_assistant(assistant)
        return await self._embed(assistant, image_id_of_key(key), None)

    async def _embed(self, assistant: str, image_id: str, data: bytes | None) -> Embedding:
        """`data` is None where the image is in the object store."""
        digest = self._digest(assistant, image_id)
        known = self._embeddings.get(digest)
        if known is not None:
            return replace(known, cache_hit=True)
        if self._busy >= self._settings.queue_size:
            raise QueueFull(f"{self._busy} requests are being worked on already")
        self._busy += 1
        try:
            tower = tower_id(self.assistants[assistant].manifest.tower)
            features = self._features.get((image_id, tower))
            cache_hit = features is not None
            if features is None:
                features = await self._flights.run(
                    (image_id, tower), lambda: self._compute_features(tower, image_id, data)
                )
            loop = asyncio.get_running_loop()
            values, shape = await loop.run_in_executor(self._torch_worker, self._project, assistant, features)
        finally:
            self._busy -= 1
        embedding = Embedding(values, shape, self._settings.dtype, digest, image_id, cache_hit)
        self._embeddings.put(digest, embedding, len(values))
        return embedding

    async def _compute_features(self, tower: str, image_id: str, data: bytes | None) -> Tensor:
        """Bytes → features `[tokens, tower_dim]`, on the tower's device."""
        if data is None:
            data = await self._read(image_id)
        pixels = await self._off_loop(self._decode, tower, data)
        features = await self._batchers[tower].submit(pixels)
        self._features.put((image_id, tower), features, features.nbytes)
        return features

    async def _read(self, image_id: str) -> bytes:
        key = image_key(image_id)
        data = await self._store.get(key)
        if await self._off_loop(sha256, data) != image_id:
            raise ObjectNotFound(f"{key} is damaged: its bytes do not have the digest of its key")
        return data

    def _decode(self, tower: str, data: bytes) -> Tensor:
        """Bytes → normalised pixels `[3, S, S]`."""
        image = decode_image(data, max_pixels=self._settings.max_pixels)
        try:
            return self._towers[tower].preprocess(image)
        except (ValueError, ZeroDivisionError, MemoryError):  # a shape no resizing can make a square of
            raise ImageError(f"an image of {image.width} × {image.height} pixels cannot be made a square") from None

    def _run_tower(self, tower: VisionEncoder, pixels: Sequence[Tensor]) -> Sequence[Tensor]:
        """`[3, S, S]` each → `[tokens, tower_dim]` each, of their own memory so that a cache may keep one alone."""
        with torch.inference_mode():
            features = tower(torch.stack(list(pixels)))
        return [one.clone() for one in features]

    def _project(self, assistant: str, features: Tensor) -> tuple[bytes, tuple[int, int]]:
        """`[tokens, tower_dim]` → bytes of `[tokens, lm_dim]` in the output dtype."""
        with torch.inference_mode():
            tokens: Tensor = self._projectors[assistant](features)
            tokens = tokens.to("cpu", getattr(torch, self._settings.dtype)).contiguous()
        return tokens.view(torch.uint8).numpy().tobytes(), (tokens.shape[0], tokens.shape[1])

    def _digest(self, assistant: str, image_id: str) -> str:
        version = self.assistants[assistant].version
        return sha256("\n".join((image_id, version, self._settings.dtype)).encode())

    def _check_assistant(self, name: str) -> None:
        if name not in self.assistants:
            known = ", ".join(sorted(self.assistants))
            raise UnknownAssistant(f"there is no assistant {name[:100]!r}; there are: {known}")

    async def _off_loop(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)


def tower_id(spec: TowerSpec) -> str:
    """Tower and preprocessing by digest: assistants that agree on it share features."""
    return sha256(spec.model_dump_json().encode())
