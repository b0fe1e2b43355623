"""The way of a chat request through the gateway, seen from both ends."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import openai
import pytest
import torch
from safetensors.torch import load

from basalt.assistants import load_assistants, sha256
from basalt.data.images import decode_image
from basalt.model.projector import load_projector
from basalt.model.vision_encoder import load_vision_encoder
from basalt.object_store import image_key
from services.gateway import vision_client
from tests.gateway.conftest import Stack, wait_for
from tests.gateway.llm_shaped import STREAM, TOO_LONG, WORDS
from tests.tiny import picture


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(url: str, **more: object) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url} | more}


def text(said: str) -> dict[str, object]:
    return {"type": "text", "text": said}


def tokens(stack: Stack, assistant: str, data: bytes) -> torch.Tensor:
    spec = load_assistants(stack.models)[assistant]
    tower = load_vision_encoder(spec.manifest.tower)
    with torch.inference_mode():
        return load_projector(spec)(tower(tower.preprocess(decode_image(data))[None]))[0]


@contextmanager
def photos(*served: bytes) -> Iterator[tuple[str, list[str]]]:
    """A plain web server of `/0`, `/1`, …: its URL and the paths asked for so far."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(served[int(self.path[1:])])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def error(response: httpx.Response) -> dict[str, object]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    return body["error"]


def test_an_image_becomes_visual_tokens_in_its_place_and_the_rest_stays(stack: Stack):
    body = {
        "model": "one",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [text("before"), image(data_url(picture(1)), detail="low"), text("after ❄")]},
        ],
        "temperature": 0.25,
        "stop": ["\n"],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "something_new": {"a": [1, None]},
    }
    response = stack.post(body)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "".join(WORDS)
    sent = stack.llm.bodies[-1]
    part = sent["messages"][1]["content"][1]
    embeddings = load(base64.b64decode(part["image_embeds"]))
    assert list(embeddings) == ["embeddings"]
    torch.testing.assert_close(embeddings["embeddings"], tokens(stack, "one", picture(1)), rtol=1e-4, atol=1e-5)
    assert part["type"] == "image_embeds"
    assert part["uuid"].startswith("sha256:")
    body["messages"][1]["content"][1] = part
    assert re.fullmatch(r"one@[0-9a-f]{64}", sent["model"])
    assert response.headers["X-Basalt-Version"] == sent["model"]
    assert response.headers["X-Basalt-Cache"] in ("nothing", "features", "embeddings")
    assert sent == body | {"model": sent["model"]}


def test_the_original_bytes_are_stored_under_their_digest(stack: Stack):
    data = picture(2, format="JPEG")
    assert stack.ask([image(data_url(data, "image/jpeg"))]).status_code == 200
    assert (stack.objects / image_key(sha256(data))).read_bytes() == data


def test_nothing_gives_an_image_back(stack: Stack):
    data = picture(2, format="JPEG")
    assert stack.ask([image(data_url(data, "image/jpeg"))]).status_code == 200
    key = image_key(sha256(data))
    for path in (f"/{key}", f"/v1/{key}", f"/v1/files/{sha256(data)}", f"/static/{key}", f"/v1/../{key}"):
        response = httpx.get(stack.url + path, trust_env=False)
        assert response.status_code == 404 and data not in response.content
    for url in (key, sha256(data), f"s3://basalt/{key}", f"file:///{stack.objects}/{key}"):
        assert stack.ask([image(url)]).status_code == 400


def test_images_that_are_too_old_go_and_may_come_again(start: Callable[..., Stack], tmp_path: Path):
    data = picture(4)
    original = tmp_path / image_key(sha256(data))
    original.parent.mkdir(parents=True)
    original.write_bytes(data)
    os.utime(original, (0, time.time() - 3 * 86400))
    stack = start(BASALT_STORE=str(tmp_path), BASALT_IMAGE_DAYS=2)
    wait_for(lambda: not original.exists())
    assert stack.ask([image(data_url(data))]).status_code == 200
    assert original.read_bytes() == data


def test_vision_without_our_store_gets_the_bytes(start: Callable[..., Stack], tmp_path):
    apart = start(BASALT_STORE=str(tmp_path))
    assert apart.ask([image(data_url(picture(3)))]).status_code == 200


def test_uuid_is_the_same_for_the_same_image_and_differs_between_assistants(stack: Stack):
    def uuid(model: str, seed: int) -> str:
        assert stack.ask([image(data_url(picture(seed)))], model=model).status_code == 200
        return stack.llm.bodies[-1]["messages"][0]["content"][0]["uuid"]

    assert uuid("one", 1) == uuid("one", 1)
    assert len({uuid("one", 1), uuid("two", 1), uuid("one", 2)}) == 3


def test_several_images_by_url_in_several_turns_keep_their_order(stack: Stack):
    pictures = [picture(10), picture(11)]
    with photos(*pictures) as (url, asked):
        messages = [
            {"role": "user", "content": [image(f"{url}/0"), text("first?")]},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": [text("and"), image(f"{url}/1"), image(f"{url}/0"), text("?")]},
        ]
        assert stack.post({"model": "two", "messages": messages}).status_code == 200
    assert sorted(asked) == ["/0", "/1"]  # the same URL once
    sent = stack.llm.bodies[-1]["messages"]
    parts = [sent[0]["content"][0], *sent[2]["content"][1:3]]
    assert [part["type"] for part in parts] == ["image_embeds"] * 3
    for part, data in zip(parts, (pictures[0], pictures[1], pictures[0]), strict=True):
        embeddings = load(base64.b64decode(part["image_embeds"]))["embeddings"]
        torch.testing.assert_close(embeddings, tokens(stack, "two", data), rtol=1e-4, atol=1e-5)


def test_streams_byte_for_byte(stack: Stack):
    response = stack.ask([image(data_url(picture(1)))], stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.content == STREAM


def test_the_openai_client(stack: Stack):
    client = stack.client()
    assert {"one", "two"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("one").id == "one"
    messages = [{"role": "user", "content": [image(data_url(picture(1))), text("What is it?")]}]
    whole = client.chat.completions.create(model="one", messages=messages)
    stream = client.chat.completions.create(model="one", messages=messages, stream=True)
    deltas = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(deltas) == whole.choices[0].message.content == "".join(WORDS)
    with pytest.raises(openai.NotFoundError, match="there are: one, two"):
        client.chat.completions.create(model="three", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.NotFoundError, match="there are: one, two"):
        client.models.retrieve("three")


PNG = data_url(picture(1))
BAD_CONTENT = {
    "bare string": ([{"type": "image_url", "image_url": PNG}], 400, "object"),
    "empty image_url": ([{"type": "image_url", "image_url": {}}], 400, "object"),
    "null image_url": ([{"type": "image_url", "image_url": None}], 400, "object"),
    "url not a string": ([{"type": "image_url", "image_url": {"url": 7}}], 400, "object"),
    "no image": ([image(data_url(b"hello, this is text", "image/png"))], 400, "not a JPEG"),
    "svg": ([image(data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"))], 400, "not a JPEG"),
    "empty image": ([image("data:image/png;base64,")], 400, "empty"),
    "truncated": ([image(data_url(picture(1)[:-300]))], 400, "truncated"),
    "truncated jpeg": ([image(data_url(picture(1, format="JPEG")[:-300]))], 400, "truncated"),
    "too many pixels": ([image(data_url(picture(1, size=(200, 101), format="JPEG")))], 400, "pixels"),
    "too many bytes": ([image(data_url(picture(1, size=(140, 140), format="BMP")))], 413, "50,000 bytes"),
    "no base64": ([image("data:image/png;base64,@@@@")], 400, "base64"),
    "broken base64": ([image("data:image/png;base64,abc")], 400, "base64"),
    "base64 not ASCII": ([image("data:image/png;base64,ä")], 400, "base64"),
    "not base64": ([image("data:image/png,%89PNG")], 400, "base64"),
    "data alone": ([image("data:")], 400, "base64"),
    "file": ([image("file:///etc/passwd")], 400, "https://"),
    "unreachable": ([image("http://127.0.0.1:1/a.png")], 400, "cannot be reached"),
    "no such host": ([image("https://no-such-host.invalid/a.png")], 400, "no host"),
    "private": ([image("http://localhost/a.png")], 400, "public"),
    "metadata": ([image("http://169.254.169.254/latest/meta-data/")], 400, "public"),
    "image_embeds": ([{"type": "image_embeds", "image_embeds": "AAAA"}], 400, "image_url part"),
    "prompt_embeds": ([{"type": "prompt_embeds", "data": "AAAA"}], 400, "image_url part"),
    "part without a type": ([{"image_embeds": "AAAA"}], 400, "image_url part"),
    "audio": ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}], 400, "image_url part"),
    "video": ([{"type": "video_url", "video_url": {"url": "https://a/b.mp4"}}], 400, "image_url part"),
    "type not a string": ([{"type": ["image_url"]}], 400, "image_url part"),
    "part is a string": (["hello"], 400, "image_url part"),
    "content is a number": (5, 400, "list of parts"),
    "too many images": ([image(PNG)] * 4, 400, "at most 3"),
}


@pytest.mark.parametrize(("content", "status", "said"), BAD_CONTENT.values(), ids=BAD_CONTENT.keys())
def test_bad_content_is_told_where_and_why(stack: Stack, content: object, status: int, said: str):
    before = len(stack.llm.bodies)
    response = stack.ask(content)
    assert response.status_code == status, response.text
    told = error(response)
    assert said in str(told["message"])
    assert str(told["param"]).startswith("messages")
    assert told["type"] == "invalid_request_error"
    assert len(stack.llm.bodies) == before
    assert stack.ask("hello").status_code == 200


BAD_BODIES = {
    "empty": (b"", 400, "JSON"),
    "no JSON": (b"{'model': 'one'}", 400, "line 1, column 2"),
    "cut off": (b'{"model": "one", "messages": [', 400, "JSON"),
    "not UTF-8": (b'{"model": "\xff"}', 400, "UTF-8"),
    "list": (b"[]", 400, "object"),
    "string": (b'"one"', 400, "object"),
    "null": (b"null", 400, "object"),
    "NaN": (b'{"model": "one", "messages": [], "temperature": NaN}', 400, "NaN"),
    "huge number": (b'{"model": ' + b"9" * 5000 + b"}", 400, "JSON"),
    "deep": (b"[" * 100_000, 400, "deep"),
    "deep object": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400, "deep"),
    "half a surrogate pair": (
        b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "surrogate",
    ),
    "no model": (b'{"messages": []}', 400, "model"),
    "model a number": (b'{"model": 5, "messages": []}', 400, "model"),
    "no messages": (b'{"model": "one"}', 400, "messages"),
    "messages empty": (b'{"model": "one", "messages": []}', 400, "messages"),
    "messages an object": (b'{"model": "one", "messages": {}}', 400, "messages"),
    "message a string": (b'{"model": "one", "messages": ["hi"]}', 400, "messages[0]"),
    "no role": (b'{"model": "one", "messages": [{"content": "hi"}]}', 400, "messages[0]"),
    "prompt_embeds": (b'{"model": "one", "messages": [{"role": "user"}], "prompt_embeds": "A"}', 400, "prompt_embeds"),
    "unknown model": (b'{"model": "gpt-4", "messages": [{"role": "user"}]}', 404, "there are: one, two"),
    "too large": (b'{"model": "' + b"a" * 400_000 + b'"}', 413, "400,000"),
}


@pytest.mark.parametrize(("raw", "status", "said"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_bodies_are_told_what_is_wrong(stack: Stack, raw: bytes, status: int, said: str):
    response = stack.post(raw=raw)
    assert response.status_code == status, response.text
    assert said in str(error(response)["message"])
    assert stack.ask("hello").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)]
)
def test_other_urls(stack: Stack, method: str, path: str, status: int):
    response = httpx.request(method, stack.url + path, trust_env=False, timeout=60)
    assert response.status_code == status
    assert path in str(error(response)["message"])


def test_refusals_of_the_llm_service(stack: Stack):
    too_long = stack.ask("too long", stream=True)
    assert too_long.status_code == 400
    assert error(too_long)["message"] == TOO_LONG
    assert error(too_long)["code"] == "context_length_exceeded"
    for said, status in (("crash", 502), ("not ours", 502), ("engine dead", 503)):
        response = stack.ask(said)
        assert response.status_code == status
        assert "llm service" in str(error(response)["message"])
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status == 503)


def test_a_stream_that_breaks_off_says_so(stack: Stack):
    response = stack.ask("break", stream=True)
    events = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert "llm service" in json.loads(events[-2])["error"]["message"]
    assert events[-1] == "[DONE]"
    with pytest.raises(openai.APIError, match="llm service"):
        list(
            stack.client().chat.completions.create(
                model="one", messages=[{"role": "user", "content": "break"}], stream=True
            )
        )


def test_a_client_that_goes_takes_its_request_along(stack: Stack):
    before = stack.llm.given_up
    body = {"model": "one", "messages": [{"role": "user", "content": "stall"}], "stream": True}
    with (
        httpx.Client(trust_env=False, timeout=60) as client,
        client.stream("POST", stack.url + "/v1/chat/completions", json=body) as response,
    ):
        assert next(response.iter_bytes())
    wait_for(lambda: stack.llm.given_up == before + 1)
    asked = len(stack.llm.bodies)
    content = json.dumps(body | {"messages": [{"role": "user", "content": "hang"}]}).encode()
    host, port = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        raw.sendall(head.encode() + content)
        wait_for(lambda: len(stack.llm.bodies) == asked + 1)
    wait_for(lambda: stack.llm.given_up == before + 2)
    assert stack.ask("hello").status_code == 200


def test_silence_of_the_llm_service_ends_in_a_503(start: Callable[..., Stack]):
    impatient = start(llm_seconds=1)
    response = impatient.ask("hang")
    assert response.status_code == 503
    assert "llm service" in str(error(response)["message"])
    stalled = impatient.ask("stall", stream=True)
    assert '"code": "llm_timeout"' in stalled.text


def test_a_frozen_llm_service_that_does_not_even_read_ends_in_a_503(start: Callable[..., Stack]):
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        url = f"http://127.0.0.1:{frozen.getsockname()[1]}"
        response = start(BASALT_LLM_URL=url, llm_seconds=1).ask("more than its socket takes " * 1_000_000)
    assert response.status_code == 503
    assert "llm service" in str(error(response)["message"])


def test_silence_of_the_vision_service_ends_in_a_503(start: Callable[..., Stack]):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        response = start(BASALT_VISION_ADDRESS=address, embed_seconds=1).ask("hello")
        assert response.status_code == 503
        assert "vision service" in str(error(response)["message"])
        assert time.monotonic() - started < 60


def test_a_slow_body_is_not_waited_for(start: Callable[..., Stack]):
    def slowly() -> Iterator[bytes]:
        yield b'{"model":'
        time.sleep(3)
        yield b'"one"}'

    url = start(body_seconds=0.5).url + "/v1/chat/completions"
    try:
        response = httpx.post(url, content=slowly(), trust_env=False, timeout=60)
    except httpx.HTTPError:
        return  # the connection was closed while the body was still coming
    assert response.status_code == 408
    error(response)


def test_services_that_go_and_come_back(start: Callable[..., Stack]):
    stack = start()
    fresh = iter(range(100, 10_000))

    def ask_new_image() -> httpx.Response:
        return stack.ask([image(data_url(picture(next(fresh))))])

    def ready() -> httpx.Response:
        return httpx.get(stack.url + "/readyz", trust_env=False, timeout=60)

    assert ask_new_image().status_code == 200
    assert ready().status_code == 200

    stack.vision.stop()
    try:
        down = ask_new_image()
        assert down.status_code == 503
        assert "vision service" in str(error(down)["message"])
        assert "retry-after" in down.headers
        assert "vision" in str(error(ready())["message"])
        assert stack.ask("text needs no vision").status_code == 200
    finally:
        stack.vision.start()
    wait_for(lambda: ask_new_image().status_code == 200)

    stack.llm_server.stop()
    try:
        down = ask_new_image()
        assert down.status_code == 503
        assert "llm service" in str(error(down)["message"])
        assert "llm" in str(error(ready())["message"])
    finally:
        stack.llm_server.start()
    assert ask_new_image().status_code == 200
    assert ready().status_code == 200


def test_seen_images_are_answered_while_vision_is_away(start: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch):
    stack = start()
    monkeypatch.setattr(stack.llm, "sees_handoff", True)
    seen, new = image(data_url(picture(7001))), image(data_url(picture(7002)))
    assert stack.ask([seen]).headers["X-Basalt-Cache"] == "nothing"
    stack.vision.stop()
    try:
        assert stack.ask([seen]).headers["X-Basalt-Cache"] == "embeddings"
        assert stack.ask([new]).status_code == 503
        monkeypatch.setattr(stack.llm, "sees_handoff", False)  # what was there has gone
        assert stack.ask([seen]).status_code == 503
    finally:
        stack.vision.start()
    wait_for(lambda: stack.ask([seen]).status_code == 200)


def test_a_frozen_vision_service_is_waited_for_once(start: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vision_client, "REMEMBERED_SECONDS", 0.0)
    stack = start(embed_seconds=2)
    monkeypatch.setattr(stack.llm, "sees_handoff", True)
    seen, hang = image(data_url(picture(7003))), threading.Event()
    assert stack.ask([seen]).status_code == 200
    stack.vision._loop.call_soon_threadsafe(hang.wait)  # its event loop stands still
    try:
        began = time.monotonic()
        for _ in range(5):
            assert stack.ask([seen]).headers["X-Basalt-Cache"] == "embeddings"
        assert time.monotonic() - began < 6
        new = stack.ask([image(data_url(picture(7005)))])
        assert new.status_code == 503 and time.monotonic() - began < 12
    finally:
        hang.set()
    wait_for(lambda: stack.ask([image(data_url(picture(7005)))]).status_code == 200)


def test_embeddings_that_have_gone_meanwhile_are_made_again(
    start: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch
):
    stack = start()
    monkeypatch.setattr(stack.llm, "sees_handoff", True)
    seen = image(data_url(picture(7004)))
    assert stack.ask([seen]).status_code == 200
    monkeypatch.setattr(stack.llm, "evicted", 1)
    assert stack.ask([seen]).status_code == 200
    part = stack.llm.bodies[-1]["messages"][0]["content"][0]
    assert part["image_embeds"].startswith("sha256:")  # by reference as before
    monkeypatch.setattr(stack.llm, "sees_handoff", False)
    assert stack.ask([seen]).status_code == 200
    assert not stack.llm.bodies[-1]["messages"][0]["content"][0]["image_embeds"].startswith("sha256:")


def test_an_object_store_that_cannot_be_written_is_named(start: Callable[..., Stack], tmp_path):
    (tmp_path / "file").write_text("in the way")
    response = start(BASALT_STORE=str(tmp_path / "file")).ask([image(PNG)])
    assert response.status_code == 503
    assert "object store" in str(error(response)["message"])


def test_no_model_code_in_the_gateway():
    program = "import sys, services.gateway.app; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
