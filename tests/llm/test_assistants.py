"""Assistants asked for while the service runs: by name, by exact version, each with its own LoRA and template."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from basalt.assistants import load_assistant
from basalt.catalog import reference
from basalt.object_store import DirectoryStore
from basalt.registry import publish
from tests.llm.conftest import SYSTEM, TERSE, Service, image, image_part, make_assistant, token_ids

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
QUESTION = "What is in the image?"


def published(service: Service, name: str, **options: object) -> str:
    """A version that is in the registry and nowhere else; returns NAME@HEX."""
    elsewhere = service.models_dir.parent / "elsewhere"
    make_assistant(elsewhere, name, service.base_lm_dir, **options)  # type: ignore[arg-type]
    store = DirectoryStore(service.models_dir.parent / "objects")
    asyncio.run(publish(store, elsewhere / name))
    return reference(load_assistant(elsewhere / name))


def test_a_version_of_the_registry_is_loaded_when_first_asked_for(service: Service) -> None:
    version = published(service, "green", lora_seed=3)
    answer = service.ask(version, QUESTION)
    assert token_ids(answer) == service.reference("../elsewhere/green", [QUESTION])
    assert answer["model"] == version


def test_more_loras_than_are_kept_are_loaded_again_by_use(service: Service) -> None:
    names = [published(service, f"many-{seed}", lora_seed=10 + seed) for seed in range(4)]
    expected = [service.reference(f"../elsewhere/many-{seed}", [QUESTION]) for seed in range(4)]
    for _ in range(2):
        assert [token_ids(service.ask(name, QUESTION)) for name in names] == expected
    with ThreadPoolExecutor(8) as pool:  # more at once than the engine has slots
        assert list(pool.map(lambda name: token_ids(service.ask(name, QUESTION)), names * 2)) == expected * 2


def test_a_version_without_a_lora_is_the_base_lm_under_its_own_name(service: Service) -> None:
    version = published(service, "bare")
    embeddings = image(12, seed=70)
    answer = service.ask(version, [image_part(embeddings), {"type": "text", "text": QUESTION}])
    assert token_ids(answer) == service.reference("plain", [embeddings, QUESTION])
    assert answer["model"] == version


def test_each_assistant_has_its_own_chat_template(service: Service) -> None:
    def prompt(model: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": QUESTION}]}
        ids = service.post(body, "/tokenize").json()["tokens"]
        return service.tokenizer().decode(ids)

    assert SYSTEM in prompt("red")
    assert TERSE in prompt("terse")
    assert SYSTEM not in prompt("terse")


@pytest.mark.parametrize(
    "name", ["nobody", "nobody@" + 64 * "a", "red@" + 64 * "a", "red@", "@", "../red", "red@../.."]
)
def test_unknown_names_are_refused_and_the_next_works(service: Service, name: str) -> None:
    response = service.post({"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
    assert response.status_code == 404
    assert token_ids(service.ask("plain", QUESTION))


def test_a_lora_of_too_high_a_rank_is_refused(service: Service) -> None:
    version = published(service, "high", lora_seed=5, rank=32)
    response = service.post({"model": version, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
    assert "BASALT_LLM_MAX_LORA_RANK" in response.text


def test_a_lora_that_would_spoil_others_answers_is_refused(service: Service) -> None:
    version = published(service, "spoilt", lora_seed=8, strength=float("inf"))
    response = service.post({"model": version, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
    assert response.status_code == 400
    assert "not finite" in response.text


def test_a_damaged_version_is_refused(service: Service) -> None:
    version = published(service, "damaged", lora_seed=6)
    lora = load_assistant(service.models_dir.parent / "elsewhere/damaged").manifest.lora
    assert lora is not None
    part = service.models_dir.parent / "objects/parts" / lora.digest.replace(":", "/")
    part.write_bytes(part.read_bytes()[:-1])
    response = service.post({"model": version, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
    assert response.status_code == 400
    assert token_ids(service.ask("red", QUESTION))
