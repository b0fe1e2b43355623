"""Whatever is posted: an answer in OpenAI's shape, never a 5xx, and the gateway lives on.

`BASALT_FUZZ=10000 pytest tests/gateway/test_fuzz.py` asks as much as is promised; without it a part of that.
"""

import asyncio
import base64
import copy
import io
import json
import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from services.gateway.app import create_app
from services.gateway.settings import Settings
from tests.gateway.conftest import Served, ServedVision, Stack
from tests.gateway.llm_shaped import LLMShaped

CASES = int(os.environ.get("BASALT_FUZZ", "500"))
AT_ONCE = 8
SECONDS = 60  # for one answer, on a busy machine

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
URLS = st.one_of(
    st.text(max_size=40),
    st.text(max_size=30).map("data:image/png;base64,".__add__),
    st.binary(max_size=40).map(lambda data: "data:;base64," + data.hex()),
    st.text(max_size=30).map("http://127.0.0.1:1/".__add__),
    st.text(max_size=20).map(lambda host: f"http://{host}.invalid/"),
    st.text(alphabet="0123456789abcdefx.:[]%@-", max_size=20).map(lambda host: f"http://{host}:1/"),
)
PARTS = st.one_of(
    JSON,
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=10)}),
    st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": JSON | st.fixed_dictionaries({"url": URLS | JSON})}
    ),
    st.fixed_dictionaries({"type": st.text(max_size=10) | JSON}),
)
MESSAGES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": JSON | st.lists(PARTS, max_size=3)}
    ),
)
BODIES = st.fixed_dictionaries(
    {"model": st.just("one") | JSON, "messages": st.lists(MESSAGES, max_size=3) | JSON},
    optional={"stream": st.booleans() | JSON, "temperature": JSON, "stop": JSON},
)


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, trust_env=False, timeout=120) as opened:
        yield opened


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    raw=BODIES.map(lambda body: json.dumps(body).encode())
    | JSON.map(lambda j: json.dumps(j).encode())
    | st.binary(max_size=200)
)
def test_never_a_500(client: httpx.Client, raw: bytes):
    response = client.post("/v1/chat/completions", content=raw)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        told = response.json()["error"]
        assert set(told) == {"message", "type", "param", "code"}
    assert client.get("/healthz").status_code == 200


Post = Callable[[bytes], Awaitable[httpx.Response]]


@pytest_asyncio.fixture
async def post(behind: tuple[ServedVision, LLMShaped, Served], tmp_path: Any) -> AsyncIterator[Post]:
    """Asks a gateway in this process, over real services."""
    vision, _, llm = behind
    places = {"BASALT_STORE": str(tmp_path / "objects"), "BASALT_DATABASE": f"sqlite:///{tmp_path}/basalt.db"}
    settings = Settings(
        **places,
        BASALT_VISION_ADDRESS=vision.address,
        BASALT_LLM_URL=llm.url,
        max_pixels=1_000_000,
        decode_memory_bytes=512 << 20,
        fetch_connect_seconds=0.5,
        fetch_seconds=1,
        fetches_per_minute=None,
        log_level="ERROR",
    )
    app = create_app(settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://here") as asks:

        async def asked(body: bytes) -> httpx.Response:
            return await asks.post("/v1/chat/completions", content=body)

        yield asked


async def ask_all(post: Post, bodies: Iterator[bytes], allowed: set[int]) -> Counter[int]:
    """Statuses, each of them one of `allowed`; every refusal in OpenAI's shape."""
    statuses: Counter[int] = Counter()

    async def some() -> None:
        for body in bodies:
            async with asyncio.timeout(SECONDS):
                response = await post(body)
            assert response.status_code in allowed, (response.status_code, response.text[:500], body[:2000])
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            statuses[response.status_code] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(some())
    assert sum(statuses.values()) == CASES
    return statuses


@pytest.mark.timeout(3600 if CASES > 1000 else 300)
async def test_mutated_images(post: Post) -> None:
    chance = random.Random(5)

    def bodies() -> Iterator[bytes]:
        for _ in range(CASES):
            url = "data:;base64," + base64.b64encode(mutated_image(chance)).decode()
            content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
            yield json.dumps({"model": "one", "messages": [{"role": "user", "content": content}]}).encode()

    statuses = await ask_all(post, bodies(), {200, 400, 413})
    print(f"{CASES} mutated images: {dict(statuses)}")
    assert min(statuses[200], statuses[400]) > CASES / 20  # both what can still be read and what cannot


@pytest.mark.timeout(3600 if CASES > 1000 else 300)
async def test_mutated_requests(post: Post) -> None:
    chance = random.Random(7)
    statuses = await ask_all(post, (mutated_request(chance) for _ in range(CASES)), {200, 400, 404, 413})
    print(f"{CASES} mutated requests: {dict(statuses)}")
    assert min(statuses[200], statuses[400]) > CASES / 20


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def seeds() -> list[bytes]:
    noise, flat = Image.effect_noise((40, 30), 80), Image.new("RGB", (64, 48), (200, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [flat.rotate(90), flat.rotate(180)]}
    return [
        encoded(noise.convert("RGB"), "JPEG"),
        encoded(noise, "JPEG", progressive=True, exif=exif),
        encoded(noise.convert("CMYK"), "JPEG"),
        encoded(noise.convert("RGB"), "PNG"),
        encoded(noise.convert("RGBA"), "PNG"),
        encoded(flat.quantize(8), "PNG", transparency=0),
        encoded(Image.new("I;16", (16, 16), 300), "PNG"),
        encoded(flat, "PNG", **frames),
        encoded(noise.convert("RGB"), "WEBP"),
        encoded(noise.convert("RGBA"), "WEBP", lossless=True),
        encoded(flat, "WEBP", **frames),
        encoded(flat, "GIF", **frames),
        encoded(noise.convert("P"), "GIF"),
        encoded(noise.convert("RGB"), "BMP"),
        encoded(noise.convert("1"), "BMP"),
        *(encoded(noise.convert("RGB"), "TIFF", compression=how) for how in (None, "tiff_lzw", "jpeg", "packbits")),
        encoded(noise.convert("F"), "TIFF"),
    ]


SEEDS = seeds()
SHARP = (0, 1, 0x7F, 0x80, 0xFF)


def mutated_image(chance: random.Random) -> bytes:
    """Bytes, numbers and whole stretches changed; PNGs mostly with checksums that are right again."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(min(len(data), chance.choice((64, 256, 1 << 20))))
        match chance.randrange(7):
            case 0 | 1:
                data[at] = chance.choice((chance.randrange(256), *SHARP))
            case 2:
                size = chance.choice((2, 4))
                data[at : at + size] = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
            case 3:
                data[at:at] = chance.randbytes(chance.randrange(1, 40))
            case 4:
                del data[at : at + chance.randrange(1, 40)]
            case 5:
                other = chance.choice(SEEDS)
                data[at : at + 60] = other[at : at + chance.randrange(120)]
            case _:
                del data[max(at, 20) :]
        data = data or bytearray(b"\0")
    return with_checksums(bytes(data)) if data[:4] == b"\x89PNG" and chance.random() < 0.8 else bytes(data)


def with_checksums(png: bytes) -> bytes:
    at, out = 8, bytearray(png[:8])
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        if at + 12 + length > len(png):
            break
        body = png[at + 4 : at + 8 + length]
        out += png[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out + png[at:])


REQUEST: dict[str, Any] = {
    "model": "one",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it? ❄"},
                {
                    "type": "image_url",
                    "image_url": {
                        "url": "data:image/png;base64," + base64.b64encode(SEEDS[3]).decode(),
                        "detail": "low",
                    },
                },
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {}}]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "user", "content": "And?"},
    ],
    "max_completion_tokens": 16,
    "temperature": 0.5,
    "stop": ["x"],
    "stream": False,
    "n": 1,
    "seed": 7,
    "logprobs": True,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    "metadata": {"a": "b"},
    "user": "somebody",
}
STRANGE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1 << 70,
        1e308,
        -0.0,
        "",
        "one",
        "two@candidate",
        "one@" + "a" * 64,
        "\u0000",
        "\ud800",
    ),
    *("❄" * 50, "a" * 5000, [], {}, [[]], [None], {"": {}}, {"url": 5}, "data:image/png;base64,", "data:,", "http://"),
    *("http://127.0.0.1/", "file:///etc/passwd", "user", "image_url", "image_embeds", "sha256:" + "0" * 64, "kept:x"),
    *({"type": "image_embeds", "image_embeds": "AAAA", "uuid": "x"}, {"type": "text"}, {"role": "user"}, "%s%n{0}"),
)
NAMES = (*REQUEST, "image_embeds", "prompt_embeds", "stream_options", "priority", "role", "content", "type", "url", "x")


def mutated_request(chance: random.Random) -> bytes:
    """Values, keys and stretches of the text changed."""
    body = copy.deepcopy(REQUEST)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        mutate(body, chance)
    raw = bytearray(json.dumps(body, ensure_ascii=chance.random() < 0.8).encode("utf-8", "surrogatepass"))
    if chance.random() < 0.25:
        at = chance.randrange(len(raw))
        raw[at : at + chance.randrange(3)] = chance.choice(
            (b"", b"\xff", b"{", b"]", b'"', b"\0", b"NaN", b"1e999", b",")
        )
    return bytes(raw)


def mutate(body: dict[str, Any], chance: random.Random) -> None:
    """Changes one place, each as likely."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            places.append((node, key))
            walk(child)

    walk(body)
    if not places:
        return
    node, key = chance.choice(places)
    value, strange = copy.deepcopy(node[key]), copy.deepcopy(chance.choice(STRANGE))
    match chance.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[chance.choice(NAMES)] = value
        case 1:
            node.extend([value] * chance.choice((1, 20)))
        case 2 if isinstance(node, dict):
            node[chance.choice(NAMES)] = strange
        case _:
            node[key] = strange
