"""One request's spans, from the gateway and the vision service as they run, form one tree; and they tell no secrets."""

import base64
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from basalt.rpc.vision.v1 import vision_pb2, vision_pb2_grpc
from tests.collector import Collector, Seen, collecting
from tests.gateway.conftest import Served, free_port, wait_for
from tests.gateway.llm_shaped import LLMShaped
from tests.tiny import make_assistant, make_tower, picture

ROOT = Path(__file__).parents[1]
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "The password of the lighthouse is marmalade"


@dataclass
class Running:
    url: str
    vision: str  # its address
    llm: LLMShaped
    collector: Collector
    directory: Path

    def ask(self, content: Any, trace: str = TRACE, **fields: Any) -> httpx.Response:
        headers = {"traceparent": f"00-{trace}-{CALLER}-01", "x-request-id": f"of-{trace[:8]}"}
        headers |= {"authorization": "Bearer bsk-of-nobody"}
        body = {"model": "one", "messages": [{"role": "user", "content": content}]} | fields
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)

    def tree(self, trace: str, count: int) -> list[Seen]:
        """The spans of a trace when there are so many."""
        self.collector.wait_for(lambda: len(self.collector.of_trace(trace)) >= count, 20)
        return self.collector.of_trace(trace)

    def lines(self, service: str, request_id: str) -> list[dict[str, Any]]:
        """What a service's log says of a request."""
        text = (self.directory / f"{service}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]  # C libraries write others
        return [line for line in lines if line.get("request_id", "").startswith(request_id)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Both services as processes of their own, behind a server of the LLM's shape."""
    root = tmp_path_factory.mktemp("tracing")
    make_assistant(root / "models", "one", make_tower(root / "tower"))
    llm = LLMShaped(sees_handoff=True)
    served = Served(llm.app())
    gateway, vision = free_port(), free_port()
    with collecting() as collector:
        environment = os.environ | collector.environment()
        environment |= {
            "BASALT_MODELS_DIR": str(root / "models"),
            "BASALT_VERSIONS_DIR": str(root / "versions"),
            "BASALT_HANDOFF_DIR": str(root / "handoff"),
            "BASALT_STORE": str(root / "objects"),
            "BASALT_DATABASE": f"sqlite:///{root}/basalt.db",
            "BASALT_VISION_PORT": str(vision),
            "BASALT_VISION_ADDRESS": f"127.0.0.1:{vision}",
            "BASALT_GATEWAY_PORT": str(gateway),
            "BASALT_GATEWAY_ALLOW_PRIVATE_HOSTS": "127.0.0.1",
            "BASALT_LLM_URL": served.url,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        processes = []
        for name in ("vision", "gateway"):
            with (root / f"{name}.log").open("wb") as log:
                command = [sys.executable, "-m", f"services.{name}"]
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log))
        url = f"http://127.0.0.1:{gateway}"
        try:
            wait_for(lambda: answers(f"{url}/readyz"), 120)
            yield Running(url, f"127.0.0.1:{vision}", llm, collector, root)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(60)
            served.stop()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "hidden-path.png").write_bytes(picture(7))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hidden-path.png?token=hidden-token"
        server.shutdown()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def names_below(spans: list[Seen], parent: Seen) -> list[str]:
    return [span.name for span in spans if span.parent == parent.id]


def one(spans: list[Seen], name: str) -> Seen:
    (found,) = [span for span in spans if span.name == name]
    return found


def test_one_request_is_one_tree(running: Running, web: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": web}}, {"type": "text", "text": SECRET}]
    response = running.ask(content, stream=True)
    assert response.status_code == 200 and "snow" in response.text
    spans = running.tree(TRACE, 18)
    root = one(spans, "POST /v1/chat/completions")
    assert (root.service, root.parent) == ("basalt-gateway", CALLER)
    assert root.attributes["request_id"] == "of-0af76519" and root.attributes["assistant"] == "one"
    assert root.attributes["images"] == 1 and root.attributes["prompt_tokens"] == 20
    stages = ["fetch", "store", "decode", "store", "queue", "vision", "llm", "first_token", "stream"]
    assert names_below(spans, root) == stages
    embed = one(spans, "Embed")
    assert embed.parent == one(spans, "vision").id and embed.service == "basalt-vision"
    assert embed.attributes == {"assistant": one_version(response), "cached": "nothing"}
    assert names_below(spans, embed) == ["look_up", "read", "decode", "queue_and_tower", "projector", "hand_off"]
    assert one(spans, "tower").parent == one(spans, "queue_and_tower").id
    ids = {span.id: span for span in spans}
    for span in spans:
        assert span.began <= span.ended and not span.failed
        assert span is root or (ids[span.parent].began <= span.began and span.ended <= ids[span.parent].ended)
    assert len(spans) == 1 + len(stages) + 1 + 6 + 1
    sent = running.llm.headers[-1]
    assert sent["traceparent"] == f"00-{TRACE}-{one(spans, 'llm').id}-01"
    assert sent["x-request-id"].startswith("of-0af76519-")


def one_version(response: httpx.Response) -> str:
    return response.headers["x-basalt-version"]


def test_log_lines_of_all_services_tell_the_same_request(running: Running) -> None:
    trace = "1" * 32
    running.ask([{"type": "image_url", "image_url": {"url": data_url(1)}}, {"type": "text", "text": SECRET}], trace)
    wait_for(lambda: running.lines("gateway", "of-11111111"), 10)
    for service in ("gateway", "vision"):
        (line,) = running.lines(service, "of-11111111")
        assert line["trace_id"] == trace and line["assistant"].startswith("one")
        assert "marmalade" not in json.dumps(line)


@pytest.mark.parametrize("traceparent", ["", "00-xyz", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 500])
def test_a_callers_trace_that_is_none_is_no_reason_to_refuse(running: Running, traceparent: str) -> None:
    headers = {"traceparent": traceparent.encode(), "x-request-id": b"of-strange"}
    body = {"model": "one", "messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=headers, trust_env=False)
    assert answer.status_code == 200
    wait_for(lambda: running.lines("gateway", "of-strange"), 10)
    new = running.lines("gateway", "of-strange")[-1]["trace_id"]
    root = one(running.tree(new, 4), "POST /v1/chat/completions")
    assert root.parent == "" and int(new, 16)


def test_what_fails_is_told_by_its_kind_alone(running: Running) -> None:
    trace = "2" * 32
    assert running.ask(SECRET + " crash", trace).status_code == 200
    assert running.ask("crash", "3" * 32).status_code == 502
    assert running.ask([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/hidden-path"}}], "4" * 32)
    (root,) = [span for span in running.tree("3" * 32, 3) if span.parent == CALLER]
    assert root.failed and root.attributes["http.response.status_code"] == 502
    assert root.attributes["error.type"] == "502"
    fetch = one(running.tree("4" * 32, 2), "fetch")
    assert fetch.failed and fetch.attributes == {"error.type": "FetchError"}


def test_what_the_vision_service_refuses_is_told_by_its_status(running: Running) -> None:
    trace = "6" * 32
    metadata = (("traceparent", f"00-{trace}-{CALLER}-01"), ("x-request-id", "of-66666666"))
    with grpc.insecure_channel(running.vision) as channel, pytest.raises(grpc.RpcError):
        request = vision_pb2.EmbedRequest(assistant="one", image_bytes=b"hidden")
        vision_pb2_grpc.VisionStub(channel).Embed(request, metadata=metadata)
    embed = one(running.tree(trace, 4), "Embed")
    assert embed.failed and embed.attributes == {"assistant": "one", "error.type": "INVALID_ARGUMENT"}
    (line,) = running.lines("vision", "of-66666666")
    assert (line["status"], line["trace_id"]) == ("INVALID_ARGUMENT", trace)


def test_nothing_of_prompts_images_answers_and_urls_leaves(running: Running, web: str) -> None:
    """Of all requests so far, and of ones that are refused at each stage."""
    trace = "5" * 32
    for content in (
        [{"type": "image_url", "image_url": {"url": web}}, {"type": "text", "text": SECRET}],
        [{"type": "image_url", "image_url": {"url": web.replace("http://", "http://user:hidden-word@")}}],
        [{"type": "image_url", "image_url": {"url": data_url(2)}}, {"type": "text", "text": f"{SECRET} too long"}],
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGlkZGVu"}}],
        "crash",
        [{"type": SECRET}],
    ):
        running.ask(content, trace)
    running.ask("hello", trace, model=SECRET)
    running.collector.wait_for(lambda: sum(span.parent == CALLER for span in running.collector.of_trace(trace)) == 7)
    told = b"".join(running.collector.raw)
    secret = [
        b"marmalade",
        b"hidden",
        b"snow",
        b"bsk-",
        base64.b64encode(picture(2))[:40],
        picture(2)[:40],
    ]
    for service in ("gateway", "vision"):
        told += (running.directory / f"{service}.log").read_bytes()
    assert len(told) > 10_000
    for each in secret:
        assert each not in told, each


def data_url(seed: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture(seed)).decode()}"


def test_off_loads_no_exporter() -> None:
    script = """
import sys
from basalt import tracing
import services.gateway.app
tracing.begin("gateway")
with tracing.span("x") as span:
    span.told(a=1)
    assert tracing.headers() == span.headers() == {} and tracing.trace_id() == ""
tracing.flush()
sys.exit(any(name.startswith("opentelemetry.exporter") for name in sys.modules))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment |= {"PYTHONPATH": str(ROOT), "OTEL_EXPORTER_OTLP_ENDPOINT": ""}
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({}, None),
        ({"ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        ({"ENDPOINT": "http://c:4318", "TRACES_ENDPOINT": "http://d/t"}, "http://d/t"),
    ],
)
def test_the_collector_is_named_as_opentelemetry_names_it(
    variables: dict[str, str], where: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from basalt import tracing

    for name in ("ENDPOINT", "TRACES_ENDPOINT"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    assert tracing.endpoint() == where
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing.endpoint() is None


def test_another_protocol_is_refused_in_one_line() -> None:
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    done = subprocess.run(
        [sys.executable, "-m", "services.gateway"],
        cwd=ROOT,
        env=environment | {"BASALT_STORE": "/tmp"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("basalt gateway: OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf")
    assert done.stderr.count("\n") == 1


def test_a_collector_that_is_away_holds_up_nothing(tmp_path: Path) -> None:
    port, nobody = free_port(), free_port()
    environment = os.environ | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{nobody}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "BASALT_GATEWAY_PORT": str(port),
        "BASALT_VISION_ADDRESS": f"127.0.0.1:{nobody}",
        "BASALT_LLM_URL": f"http://127.0.0.1:{nobody}",
        "BASALT_STORE": str(tmp_path / "objects"),
        "BASALT_DATABASE": f"sqlite:///{tmp_path}/basalt.db",
        "PYTHONPATH": str(ROOT),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "services.gateway"], cwd=ROOT, env=environment, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{url}/healthz"), 60)
        body = {"model": "one", "messages": [{"role": "user", "content": "Hello!"}]}
        took = []
        for _ in range(20):
            began = time.perf_counter()
            assert httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False).status_code == 503
            took.append(time.perf_counter() - began)
        assert sorted(took)[10] < 0.5
        began = time.perf_counter()
        process.terminate()
        process.wait(60)
        assert time.perf_counter() - began < 10
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "log").read_text().count("\n") < 60
