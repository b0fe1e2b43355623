"""Whatever is posted: an answer in OpenAI's shape, never a 500, and the gateway lives on."""

import json
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.conftest import Stack

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
