"""What is decoded is exactly what was sent; what does not fit is refused by name."""

import base64
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

vllm_exceptions = pytest.importorskip("vllm.exceptions", reason="the llm extra is not installed")

from basalt.handoff import MISSED, Blob, HandoffDirectory  # noqa: E402
from services.llm.embeddings import EmbeddingsConnector, EmbeddingsSpec  # noqa: E402

SPEC = EmbeddingsSpec(lm_dim=8, max_tokens=10, dtype=torch.float32, handoff=Path("/nowhere"))

DIGEST = "sha256:" + 64 * "a"


def encoded(embeddings: torch.Tensor, name: str = "embeddings") -> str:
    return base64.b64encode(save({name: embeddings})).decode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 10])
def test_decodes_to_the_engines_dtype(tokens: int, dtype: torch.dtype) -> None:
    sent = torch.randn(tokens, 8).to(dtype)
    received = SPEC.decode(encoded(sent))
    assert received.dtype == torch.float32
    assert torch.equal(received, sent.float())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (encoded(torch.ones(3, 9)), "width 8"),
        (encoded(torch.ones(0, 8)), "1 to 10 tokens, not 0"),
        (encoded(torch.ones(11, 8)), "1 to 10 tokens, not 11"),
        (encoded(torch.ones(1, 3, 8)), "shape"),
        (encoded(torch.ones(3, 8, dtype=torch.int64)), "dtype"),
        (encoded(torch.full((3, 8), float("nan"))), "finite"),
        (encoded(torch.full((3, 8), float("-inf"))), "finite"),
        (encoded(torch.ones(3, 8), name="other"), "named 'embeddings'"),
        ("*", "base64"),
        ("å", "base64"),
        (base64.b64encode(b"x" * 100).decode(), "safetensors"),
        (base64.b64encode(save({"embeddings": torch.ones(3, 8)})[:-1]).decode(), "safetensors"),
        ("A" * 100_000, "more than"),
    ],
)
def test_refuses_what_does_not_fit(data: str, said: str) -> None:
    with pytest.raises(vllm_exceptions.VLLMValidationError, match=said):
        SPEC.decode(data)


def test_values_that_overflow_in_the_engines_dtype_are_refused() -> None:
    spec = EmbeddingsSpec(lm_dim=8, max_tokens=10, dtype=torch.float16, handoff=Path("/nowhere"))
    with pytest.raises(vllm_exceptions.VLLMValidationError, match="finite in float16"):
        spec.decode(encoded(torch.full((3, 8), 1e5)))


async def test_connector_fetches_nothing() -> None:
    connector = EmbeddingsConnector(SPEC, allowed_local_media_path="/")
    for fetch in (connector.fetch_image_async, connector.fetch_audio_async, connector.fetch_video_async):
        with pytest.raises(vllm_exceptions.VLLMValidationError, match="image_embeds"):
            await fetch("file:///etc/passwd")
    for fetch in (connector.fetch_audio_embedding_async, connector.fetch_video_embedding_async):
        with pytest.raises(vllm_exceptions.VLLMValidationError, match="image_embeds"):
            await fetch("AAAA")


def test_by_reference_it_is_what_lies_under_the_digest(tmp_path: Path) -> None:
    spec = EmbeddingsSpec(lm_dim=8, max_tokens=10, dtype=torch.bfloat16, handoff=tmp_path)
    sent = torch.randn(4, 8).to(torch.bfloat16)
    data = sent.view(torch.uint8).numpy().tobytes()
    HandoffDirectory(tmp_path, 10_000).put(DIGEST, Blob(data, (4, 8), "bfloat16"))
    assert torch.equal(spec.decode(DIGEST), sent)


def test_a_reference_that_leads_nowhere_is_told_apart(tmp_path: Path) -> None:
    spec = EmbeddingsSpec(lm_dim=8, max_tokens=10, dtype=torch.float32, handoff=tmp_path)
    with pytest.raises(vllm_exceptions.VLLMValidationError) as caught:
        spec.decode(DIGEST)
    assert caught.value.parameter == MISSED


def test_what_lies_under_the_digest_is_checked_too(tmp_path: Path) -> None:
    spec = EmbeddingsSpec(lm_dim=9, max_tokens=10, dtype=torch.float32, handoff=tmp_path)
    HandoffDirectory(tmp_path, 10_000).put(DIGEST, Blob(bytes(4 * 8 * 4), (4, 8), "float32"))
    with pytest.raises(vllm_exceptions.VLLMValidationError, match="width 9"):
        spec.decode(DIGEST)
    (tmp_path / DIGEST.removeprefix("sha256:")).write_bytes(b"rubbish")
    with pytest.raises(vllm_exceptions.VLLMValidationError, match="not readable"):
        spec.decode(DIGEST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(value: float, dtype: torch.dtype) -> None:
    spec = EmbeddingsSpec(lm_dim=37, max_tokens=10, dtype=dtype, handoff=Path("/nowhere"))
    for place in range(0, 370, 7):
        embeddings = torch.randn(370).to(dtype)
        embeddings[place] = value
        with pytest.raises(vllm_exceptions.VLLMValidationError, match="finite"):
            spec.decode(encoded(embeddings.view(10, 37)))
