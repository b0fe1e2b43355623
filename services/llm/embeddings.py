"""What the LLM service accepts as an image: embeddings already in the base LM's space.

A content part `{"type": "image_embeds", "image_embeds": …, "uuid": …}` carries a safetensors blob with one tensor
`embeddings` [tokens, lm_dim]: its digest, under which it lies in the hand-off directory, or the blob itself in base64.
vLLM's own connector would `torch.load` those bytes and would fetch URLs; ours decodes safetensors, checks every
property the engine does not check itself, and fetches nothing.
"""

import asyncio
import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from prometheus_client import Histogram
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.media.connector import global_thread_pool

from basalt.handoff import MISSED, TENSOR, handoff_path

CONNECTOR = "basalt"  # the value of VLLM_MEDIA_CONNECTOR
MAX_HEADER_BYTES = 4096  # of a safetensors blob with one tensor

HANDOFF = Histogram(
    "basalt_llm_handoff_seconds",
    "Time to read and check one image's embeddings, by how they came.",
    ["way"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
)


@dataclass(frozen=True)
class EmbeddingsSpec:
    """What fits the base LM that is loaded."""

    lm_dim: int
    max_tokens: int  # of one image: all of the context at most
    dtype: torch.dtype  # the engine's
    handoff: Path  # the directory

    def decode(self, encoded: str) -> torch.Tensor:
        """The tensor [tokens, lm_dim] in the engine's dtype.

        Raises:
            VLLMValidationError: (a 400 to the client) not base64, not safetensors, or a tensor of another
                name, dtype, shape or width; no tokens or too many; a value that is not finite; a reference that leads
                nowhere.
        """
        path = handoff_path(self.handoff, encoded)
        with HANDOFF.labels("inline" if path is None else "reference").time():
            return self._decode_inline(encoded) if path is None else self._read(path)

    def _read(self, path: Path) -> torch.Tensor:
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise VLLMValidationError(
                f"image_embeds: no embeddings lie under sha256:{path.name}", parameter=MISSED
            ) from None
        except (SafetensorError, OSError) as error:
            raise _bad(f"what lies under sha256:{path.name} is not readable ({error})") from error
        return self._only(tensors)

    def _decode_inline(self, encoded: str) -> torch.Tensor:
        if len(encoded) > self._max_encoded_length:
            raise _bad(
                f"{len(encoded)} characters are more than {self.max_tokens} tokens of {self.lm_dim} float32 values"
            )
        try:
            tensors = load(base64.b64decode(encoded, validate=True))
        except (binascii.Error, ValueError) as error:
            raise _bad(f"not valid base64 ({error})") from error
        except SafetensorError as error:
            raise _bad(f"not a readable safetensors blob ({error})") from error
        return self._only(tensors)

    def _only(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if set(tensors) != {TENSOR}:
            raise _bad(f"the blob must hold one tensor named {TENSOR!r}, it holds {sorted(tensors)[:4]}")
        return self._checked(tensors[TENSOR])

    def _checked(self, embeddings: torch.Tensor) -> torch.Tensor:
        if embeddings.dtype not in (torch.bfloat16, torch.float32):
            raise _bad(f"dtype must be bfloat16 or float32, not {str(embeddings.dtype).removeprefix('torch.')}")
        if embeddings.ndim != 2:
            raise _bad(f"shape must be [tokens, {self.lm_dim}], not {list(embeddings.shape)}")
        tokens, width = embeddings.shape
        if width != self.lm_dim:
            raise _bad(f"the base LM takes embeddings of width {self.lm_dim}, these have width {width}")
        if not 1 <= tokens <= self.max_tokens:
            raise _bad(f"an image takes 1 to {self.max_tokens} tokens, not {tokens}")
        embeddings = embeddings.to(self.dtype)
        # One pass that keeps nothing: a value that is not finite shows in the least or the greatest of them.
        if not torch.isfinite(torch.stack(torch.aminmax(embeddings))).all():
            raise _bad(f"every value must be finite in {str(self.dtype).removeprefix('torch.')}")
        return embeddings

    @property
    def _max_encoded_length(self) -> int:
        return (self.max_tokens * self.lm_dim * 4 + MAX_HEADER_BYTES) * 4 // 3 + 4


class EmbeddingsConnector(MediaConnector):
    """vLLM's way to media, closed to everything but image embeddings."""

    def __init__(self, spec: EmbeddingsSpec, **connector_options: object) -> None:
        """`connector_options` are what vLLM passes to every connector; they concern fetching, so they go unused."""
        super().__init__()
        self.spec = spec

    def fetch_image_embedding(self, data: str) -> torch.Tensor:
        return self.spec.decode(data)

    async def fetch_image_embedding_async(self, data: str) -> torch.Tensor:
        return await asyncio.get_running_loop().run_in_executor(global_thread_pool, self.spec.decode, data)

    def load_from_url(self, *_: object, **__: object) -> NoReturn:
        raise VLLMValidationError("this service takes images as image_embeds parts only", parameter="messages")

    async def load_from_url_async(self, *_: object, **__: object) -> NoReturn:
        self.load_from_url()

    def fetch_audio_embedding(self, data: str) -> NoReturn:
        self.load_from_url()

    async def fetch_audio_embedding_async(self, data: str) -> NoReturn:
        self.load_from_url()

    def fetch_video_embedding(self, data: str) -> NoReturn:
        self.load_from_url()

    async def fetch_video_embedding_async(self, data: str) -> NoReturn:
        self.load_from_url()


def _bad(what: str) -> VLLMValidationError:
    return VLLMValidationError(f"image_embeds: {what}", parameter="image_embeds")
