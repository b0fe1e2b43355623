"""The same service on other base LMs: Qwen2, and the embedded default's where it is at hand."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.llm.conftest import Service, image, image_part, make_assistant, run_service, token_ids

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
QUESTION = "What is in the image?"


@pytest.fixture(scope="module")
def qwen2(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models_dir = tmp_path_factory.mktemp("models")
    make_assistant(models_dir, "green", tiny_qwen2, lora_seed=3)
    yield from run_service(tiny_qwen2, models_dir)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    base_lm_dir = Path(os.environ.get("BASALT_BASE_LM_DIR", "var/base/smollm2-135m-instruct"))
    if not (base_lm_dir / "config.json").is_file():
        pytest.skip(f"no SmolLM2 in {base_lm_dir}: run `basalt models prepare` or set BASALT_BASE_LM_DIR")
    models_dir = tmp_path_factory.mktemp("models")
    make_assistant(models_dir, "plain", base_lm_dir)
    yield from run_service(base_lm_dir.resolve(), models_dir)


def test_qwen2_with_a_lora_answers_as_peft(qwen2: Service) -> None:
    embeddings = image(33, seed=90)
    answer = qwen2.ask("green", [image_part(embeddings), {"type": "text", "text": QUESTION}])
    assert token_ids(answer) == qwen2.reference("green", [embeddings, QUESTION])


def test_sigterm_lets_a_running_answer_finish(qwen2: Service) -> None:
    """The last test on this service: it ends it."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(qwen2.ask, "green", QUESTION, max_tokens=400)
        while not _running(qwen2):
            assert not answer.done(), "the answer was over before the service was told to stop"
        qwen2.process.send_signal(signal.SIGTERM)
        assert len(token_ids(answer.result())) == 400
    assert qwen2.process.wait(30) == 0


def test_smollm2_knows_paris_from_text_and_from_its_embeddings(smollm2: Service) -> None:
    question = "What is the capital of France?"
    as_text = smollm2.ask("plain", f"Hello there.\n{question}")
    as_embeddings = smollm2.ask(
        "plain", [image_part(smollm2.embed("Hello there.")), {"type": "text", "text": question}]
    )
    assert "Paris" in as_text["choices"][0]["message"]["content"]
    assert token_ids(as_embeddings) == token_ids(as_text)
    assert token_ids(as_text) == smollm2.reference("plain", [f"Hello there.\n{question}"])


def _running(service: Service) -> bool:
    """Whether the engine is answering, by vLLM's own metric."""
    metrics = httpx.get(f"{service.url}/metrics").text.splitlines()
    return any(line.startswith("vllm:num_requests_running") and not line.endswith(" 0.0") for line in metrics)
