"""As a user would: photos to the whole stack with the `openai` client, and things that go wrong."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from basalt.assistants import load_assistant
from basalt.model.assistant import LocalAssistant
from services.ui.example import QUESTIONS as EXAMPLE_QUESTIONS
from services.ui.example import example_image

from .conftest import ROOT, Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

MODEL = "basalt-tiny"


def sign(text: str = "STOP") -> bytes:
    image = Image.new("RGB", (256, 256), (220, 30, 35))
    ImageDraw.Draw(image).text((128, 128), text, fill="white", font=ImageFont.load_default(72), anchor="mm")
    return png(image)


def shape(colour: str) -> bytes:
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).ellipse((60, 60, 196, 196), fill=colour)
    return png(image)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def question(*parts: str | dict) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def answer(stack: Stack, messages: list[dict], **options) -> str:
    options = {"temperature": 0, "max_tokens": 24} | options
    reply = stack.client().chat.completions.create(model=MODEL, messages=messages, **options)  # type: ignore[arg-type]
    return reply.choices[0].message.content or ""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server with a picture and a text file."""
    (tmp_path / "sign.png").write_bytes(sign())
    (tmp_path / "page.html").write_text("<p>not an image</p>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_models_lists_the_default(stack: Stack) -> None:
    assert MODEL in [model.id for model in stack.client().models.list()]


def test_still_talks(stack: Stack) -> None:
    assert "Paris" in answer(stack, [{"role": "user", "content": "What is the capital of France?"}])


def test_sees_what_is_there(stack: Stack) -> None:
    assert "circle" in answer(stack, [question(picture(data_url(shape("red"))), "Describe the image.")]).lower()
    assert "word" in answer(stack, [question(picture(data_url(sign())), "Describe the image.")]).lower()


def test_the_chat_page_s_example_is_answered_right(stack: Stack) -> None:
    example = picture(data_url(example_image()))
    for asked, words in zip(EXAMPLE_QUESTIONS, (["OPEN"], ["red"], ["red circle", "blue square"]), strict=True):
        said = answer(stack, [question(example, asked)], max_tokens=40)
        assert all(word in said for word in words), said


def test_stream_equals_the_whole_answer(stack: Stack) -> None:
    messages = [question(picture(data_url(sign())), "Describe the image.")]
    stream = stack.client().chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=24, stream=True
    )  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 2
    assert "".join(pieces) == answer(stack, messages)


def test_web_url_equals_data_url(stack: Stack, web: str) -> None:
    asked = "What does it say?"
    by_url = answer(stack, [question(picture(f"{web}/sign.png"), asked)])
    assert by_url == answer(stack, [question(picture(data_url(sign())), asked)])


def test_same_answers_as_transformers_in_float32(stack: Stack) -> None:
    """Tower, projector, splice, LoRA and template through all services equal the model in one process."""
    local = LocalAssistant(load_assistant(ROOT / "models" / MODEL), ROOT / "var/base/smollm2-135m-instruct")
    for image in (sign("OPEN"), shape("green")):
        for asked in ("Describe the image.", "What is in the picture?"):
            parts = [{"type": "image"}, {"type": "text", "text": asked}]
            decoded = Image.open(io.BytesIO(image)).convert("RGB")
            with torch.inference_mode():
                expected = local.answer([([{"role": "user", "content": parts}], [decoded])], max_new_tokens=24)[0]
            assert answer(stack, [question(picture(data_url(image)), asked)]).strip() == expected


def test_second_turn_and_two_images(stack: Stack) -> None:
    first = [question(picture(data_url(shape("red"))), "What colour is the circle?")]
    said = answer(stack, first)
    again = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "Is there a circle?"}]
    assert answer(stack, again)
    assert answer(stack, [question(picture(data_url(shape("red"))), picture(data_url(sign())), "Describe the images.")])


BAD = {
    "not an image": data_url(b"just some text"),
    "truncated": data_url(sign()[:200]),
    "empty": "data:image/png;base64,",
    "not base64": "data:image/png;base64,@@@@",
    "unreachable": "http://127.0.0.1:9/nothing.png",
    "private address": "http://10.0.0.1/a.png",
    "unknown scheme": "ftp://example.org/a.png",
}


@pytest.mark.parametrize("url", BAD.values(), ids=BAD.keys())
def test_bad_image_is_refused_and_the_next_request_works(stack: Stack, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        answer(stack, [question(picture(url), "What is this?")])
    body = caught.value.response.json()["error"]
    assert body["message"] and body["type"]
    assert answer(stack, [{"role": "user", "content": "Hello!"}], max_tokens=4)


def test_page_instead_of_an_image_is_refused(stack: Stack, web: str) -> None:
    with pytest.raises(openai.BadRequestError, match="image"):
        answer(stack, [question(picture(f"{web}/page.html"), "What is this?")])


def test_unknown_model_malformed_json_and_too_long_a_context(stack: Stack) -> None:
    with pytest.raises(openai.NotFoundError, match=MODEL):
        stack.client().chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hi"}])
    reply = httpx.post(f"{stack.gateway}/v1/chat/completions", content=b"{not json", trust_env=False)
    assert reply.status_code == 400 and reply.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match=r"context|length|tokens"):
        answer(stack, [{"role": "user", "content": "word " * 20_000}])


@pytest.mark.parametrize("name", ["vision", "llm"])
def test_a_dead_service_is_named_and_comes_back(stack: Stack, name: str) -> None:
    service = stack.service(name)
    family = [*service.children(recursive=True), service]
    for process in family:
        process.kill()
    messages = [question(picture(data_url(shape("orange" if name == "llm" else "purple"))), "What is this?")]
    with pytest.raises(openai.InternalServerError) as caught:
        answer(stack, messages)
    assert caught.value.status_code == 503, caught.value.response.text
    assert name in caught.value.response.json()["error"]["message"].lower()
    deadline = time.monotonic() + 240
    while True:
        try:
            assert answer(stack, messages)
            return
        except openai.APIStatusError as error:
            assert error.status_code in (502, 503), error.response.text
            assert time.monotonic() < deadline, "it did not come back"
            time.sleep(2)
