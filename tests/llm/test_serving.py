"""The real service answers as transformers and peft do, and survives what it is sent."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.collector import Collector
from tests.llm.conftest import CONTEXT, LM_DIM, Service, image, image_part, token_ids

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
QUESTION = "What is in the image?"
BLOCK = 128  # tokens, of vLLM's prefix cache on a CPU


@pytest.mark.parametrize("model", ["plain", "red", "blue"])
def test_text_sent_as_its_own_embeddings_gets_the_same_answer(service: Service, model: str) -> None:
    as_text = service.ask(model, f"A dog on the grass.\n{QUESTION}")
    as_embeddings = service.ask(
        model, [image_part(service.embed("A dog on the grass.")), {"type": "text", "text": QUESTION}]
    )

    assert token_ids(as_embeddings) == token_ids(as_text)
    assert token_ids(as_text) == service.reference(model, [f"A dog on the grass.\n{QUESTION}"])
    assert as_embeddings["usage"]["prompt_tokens"] == as_text["usage"]["prompt_tokens"]


def test_loras_change_the_answer(service: Service) -> None:
    answers = [token_ids(service.ask(model, QUESTION)) for model in ("plain", "red", "blue")]
    assert len({tuple(answer) for answer in answers}) == 3


def test_assistants_and_images_of_all_sizes_at_once_are_each_right(service: Service) -> None:
    """One batch holds two LoRAs, requests without one, and images of seven token counts."""
    models = ["red", "plain", "blue", "plain", "red", "blue", "plain"]
    images = [image(tokens, seed) for seed, tokens in enumerate((17, 30, 64, 100, 1, 129, 256))]

    def ask(model: str, embeddings: torch.Tensor) -> list[int]:
        return token_ids(service.ask(model, [image_part(embeddings), {"type": "text", "text": QUESTION}]))

    with ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(ask, models, images))

    assert answers == [service.reference(model, [i, QUESTION]) for model, i in zip(models, images, strict=True)]


@pytest.mark.parametrize("sizes", [(9, 9), (9, 21, 5)], ids=["same size", "different sizes"])
def test_several_images_in_one_message_stand_where_they_were_put(service: Service, sizes: tuple[int, ...]) -> None:
    images = [image(tokens, seed=10 + seed) for seed, tokens in enumerate(sizes)]
    content: list[Any] = []
    prompt: list[Any] = []
    for number, embeddings in enumerate(images):
        content += [{"type": "text", "text": f"Image {number}:"}, image_part(embeddings)]
        prompt += [f"Image {number}:", embeddings]

    assert token_ids(service.ask("red", content)) == service.reference("red", prompt)


def test_bfloat16_embeddings_are_taken(service: Service) -> None:
    embeddings = image(12, seed=30).to(torch.bfloat16)
    answer = token_ids(service.ask("plain", [image_part(embeddings)]))
    assert answer == service.reference("plain", [embeddings.float()])


def test_next_turn_reuses_every_full_block_of_the_turn_before(service: Service) -> None:
    digits = [service.tokenizer().convert_tokens_to_ids(digit) for digit in "0123456789"]
    question = {"role": "user", "content": [image_part(image(200, seed=40)), {"type": "text", "text": QUESTION}]}

    # Digits tokenise one by one, so that the answer sent back is the same tokens.
    first = service.chat("red", [question], max_tokens=200, allowed_token_ids=digits)
    answer = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    second = service.chat("red", [question, answer, {"role": "user", "content": "Is it a dog?"}])

    written = first["usage"]["total_tokens"] - 1  # the last token's keys and values are never computed
    assert written > 3 * BLOCK
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= written // BLOCK * BLOCK


def test_same_image_after_the_same_text_is_reused_and_another_is_not(service: Service) -> None:
    system = {"role": "system", "content": "Look well. " * 60}
    embeddings = image(300, seed=50)

    def cached(part: dict[str, str], question: str) -> int:
        user = {"role": "user", "content": [part, {"type": "text", "text": question}]}
        return service.chat("blue", [system, user])["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached(image_part(embeddings), "What is it?")
    again = cached(image_part(embeddings), "How many are there?")
    other = cached(image_part(image(300, seed=51)), "What is it?")

    assert again >= 4 * BLOCK  # text and image
    assert 2 * BLOCK <= other < again  # text only


def test_streaming_says_the_same(service: Service) -> None:
    content = [image_part(image(25, seed=60)), {"type": "text", "text": QUESTION}]
    whole = service.ask("red", content)["choices"][0]["message"]["content"]
    body = {
        "model": "red",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 12,
        "ignore_eos": True,
        "stream": True,
    }
    streamed = ""
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    for line in lines[:-1]:
        streamed += json.loads(line)["choices"][0]["delta"].get("content") or ""

    assert lines[-1] == "[DONE]"
    assert streamed == whole


def test_chat_features_work_around_an_image(service: Service) -> None:
    content = [image_part(image(25, seed=61)), {"type": "text", "text": QUESTION}]
    response = service.ask("red", content, n=2, temperature=1, logprobs=True, top_logprobs=2)
    assert len(response["choices"]) == 2
    assert len(response["choices"][0]["logprobs"]["content"]) == 12

    body = {"model": "red", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    chosen = service.post(body | {"structured_outputs": {"choice": ["a dog", "a cat"]}}).json()
    assert chosen["choices"][0]["message"]["content"] in ("a dog", "a cat")


@pytest.mark.parametrize("model", ["plain", "red"])
def test_image_written_as_text_is_text(service: Service, model: str) -> None:
    embeddings = image(20, seed=70)
    text = "Is <image> a tag, as in <image></image>?"

    alone = service.ask(model, text)
    assert token_ids(alone) == service.reference(model, [text])
    beside = service.ask(
        model, [{"type": "text", "text": text}, image_part(embeddings), {"type": "text", "text": text}]
    )
    assert token_ids(beside) == service.reference(model, [text, embeddings, text])


def test_image_in_earlier_answers_and_names_is_text(service: Service) -> None:
    messages = [
        {"role": "user", "content": [image_part(image(20, seed=71)), {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "An <image>."},
        {"role": "user", "content": "Why <image>?"},
    ]
    assert len(token_ids(service.chat("plain", messages))) == 12


def _blob(data: bytes) -> dict[str, str]:
    return {"type": "image_embeds", "image_embeds": base64.b64encode(data).decode(), "uuid": "x"}


GOOD = image_part(image(5, seed=80))
NOT_FINITE = torch.tensor([[float("nan")] * LM_DIM])
BAD_PARTS = {
    "wrong width": (image_part(image(5, seed=81, width=LM_DIM + 1)), f"width {LM_DIM}"),
    "NaN": (image_part(NOT_FINITE), "finite"),
    "infinity": (image_part(NOT_FINITE.nan_to_num(nan=float("inf"))), "finite"),
    "no tokens": (image_part(torch.zeros(0, LM_DIM)), "tokens"),
    "more tokens than the context": (image_part(image(CONTEXT + 1, seed=82)), "tokens"),
    "no room for text": (image_part(image(CONTEXT, seed=83)), "context"),
    "far too large": (_blob(bytes(2**20)), "more than"),
    "three dimensions": (image_part(image(6, seed=84)[None]), "shape"),
    "one dimension": (image_part(image(1, seed=85)[0]), "shape"),
    "integers": (image_part(torch.ones(5, LM_DIM, dtype=torch.int32)), "dtype"),
    "half precision": (image_part(torch.ones(5, LM_DIM, dtype=torch.float16)), "dtype"),
    "not base64": (GOOD | {"image_embeds": "%%%not base64%%%"}, "base64"),
    "not safetensors": (_blob(b"not safetensors at all"), "safetensors"),
    "truncated": (_blob(save({"embeddings": torch.ones(5, LM_DIM)})[:-40]), "safetensors"),
    "another tensor": (_blob(save({"other": torch.ones(5, LM_DIM)})), "embeddings"),
    "empty": (GOOD | {"image_embeds": ""}, "image_embeds"),
    "a pickle in a dict": (GOOD | {"image_embeds": {"image_embeds": "gASVAAAA"}}, "image_embeds"),
    "no uuid": ({k: v for k, v in GOOD.items() if k != "uuid"}, "uuid"),
    "no data": ({k: v for k, v in GOOD.items() if k != "image_embeds"}, "image_embeds"),
    "a URL": ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}, "image_embeds"),
    "a URL with a uuid": (
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}, "uuid": "x"},
        "image_embeds",
    ),
    "a URL in disguise": (GOOD | {"image_url": "http://127.0.0.1:1/x.png"}, "image_url"),
    "a URL without a type": ({"image_url": "file:///etc/passwd"}, "image_embeds"),
    "a data URL": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "image_embeds"),
    "audio": ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "image_embeds"),
    "a video": ({"type": "video_url", "video_url": {"url": "http://127.0.0.1:1/x.mp4"}}, "image_embeds"),
    "audio embeddings": ({"type": "audio_embeds", "audio_embeds": "gASVAAAA"}, "image_embeds"),
    "prompt embeddings": ({"type": "prompt_embeds", "data": "gASVAAAA"}, "image_embeds"),
    "a text with a uuid and a URL": (
        {"type": "text", "text": "x", "uuid": "x", "image_url": "http://127.0.0.1:1/"},
        "text",
    ),
    "no such type": ({"type": "hologram"}, "image_embeds"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_bad_part_gets_a_clear_400_and_the_next_request_works(service: Service, name: str) -> None:
    part, said = BAD_PARTS[name]
    message = {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}
    response = service.post({"model": "red", "messages": [message], "max_tokens": 4})

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert said in error["message"]
    assert len(token_ids(service.ask("red", [GOOD], max_tokens=2))) == 2


def test_good_and_bad_images_of_different_widths_in_one_request(service: Service) -> None:
    content = [GOOD, image_part(image(7, seed=86, width=32))]
    response = service.post({"model": "red", "messages": [{"role": "user", "content": content}]})
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    "options", [{"truncate_prompt_tokens": 40}, {"mm_processor_kwargs": {"x": 1}}, {"media_io_kwargs": {"image": {}}}]
)
def test_options_that_would_tamper_with_images_are_refused(service: Service, options: dict[str, Any]) -> None:
    body = {"model": "red", "messages": [{"role": "user", "content": [image_part(image(30, seed=87))]}]}
    response = service.post(body | options)
    assert response.status_code == 400, response.text


def test_mark_put_together_from_two_texts_is_refused(service: Service) -> None:
    content = [GOOD, {"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]
    response = service.post({"model": "red", "messages": [{"role": "user", "content": content}]})
    assert response.status_code == 400
    assert "<image>" in response.json()["error"]["message"]


def test_unknown_assistant_is_a_404(service: Service) -> None:
    response = service.post({"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]})
    assert response.status_code == 404
    assert "nobody" in response.json()["error"]["message"]


def test_models_are_the_assistants(service: Service) -> None:
    names = {model["id"] for model in httpx.get(f"{service.url}/v1/models").json()["data"]}
    assert names >= {"plain", "red", "blue"}


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/v1/load_lora_adapter", "/v1/responses", "/nowhere"])
def test_other_paths_are_closed(service: Service, path: str) -> None:
    response = service.post({"model": "red", "token_ids": [1, 2, 3]}, path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NotFoundError"


def test_its_span_and_log_line_belong_to_the_request_and_tell_no_text(service: Service, collector: Collector) -> None:
    trace, caller = "d" * 32, "c" * 16
    headers = {"traceparent": f"00-{trace}-{caller}-01", "x-request-id": "req_1-abcd"}
    content = ["The password is marmalade", image_part(image(3, 1))]
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    body = {"model": "red", "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    answer = httpx.post(f"{service.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "req_1-abcd"
    collector.wait_for(lambda: collector.of_trace(trace), 20)
    (span,) = collector.of_trace(trace)
    assert (span.service, span.name, span.parent) == ("basalt-llm", "llm_request", caller)
    assert span.attributes["gen_ai.usage.completion_tokens"] == 4
    assert 0 < span.attributes["gen_ai.latency.time_in_model_prefill"] < span.attributes["gen_ai.latency.e2e"]
    assert "req_1-abcd" in span.attributes["gen_ai.request.id"]
    (line,) = service.lines("req_1-abcd")
    assert (line["logger"], line["status"], line["trace_id"]) == ("basalt.llm", 200, trace)
    service.log.seek(0)
    assert not any(b"marmalade" in message for message in [*collector.raw, service.log.read()])
