"""What the gateway alone costs: beside a bare uvicorn + httpx proxy, and beside asking the upstream itself.

`python benchmarks/gateway.py [--quick]` puts upstreams that answer at once behind both, asks them in turn, round by
round, and ends with one line of JSON. Goals: 0.6 of the bare proxy's requests/s, streams included; until an answer's
first byte, or a stream's first event, 2 ms (p50) and 10 ms (p99) more than the upstream itself takes.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import grpc
import httpx
import psutil
import typer
from grpc_health.v1 import health, health_pb2_grpc

from basalt.preflight import ROOT
from basalt.rpc.vision.v1 import vision_pb2, vision_pb2_grpc

GOAL_RATE, GOAL_P50, GOAL_P99 = 0.6, 0.002, 0.010
MODEL = "instant"
CONNECTIONS = 16
EVENTS = 32  # of a streamed answer

Address = tuple[str, int]


# What runs in processes of its own


async def upstream(port: int) -> None:
    """An LLM that has answered before it was asked: raw bytes, so that it is never what is waited for."""
    text = "A small answer of a few words, as there are many."
    usage = {"prompt_tokens": 20, "completion_tokens": EVENTS, "total_tokens": 20 + EVENTS}
    told = {"id": "chatcmpl-1", "created": 1, "model": MODEL}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = _compact(told | {"object": "chat.completion", "choices": [choice], "usage": usage})
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n"
    answer = head % b"application/json" + b"Content-Length: %d\r\n\r\n" % len(whole) + whole
    chunk = told | {"object": "chat.completion.chunk"}
    event = chunk | {"choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]}
    pieces = [_chunked(_event(event))] * EVENTS + [_chunked(_event(chunk | {"choices": [], "usage": usage}))]
    pieces += [_chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"]
    stream_head = head % b"text/event-stream" + b"Transfer-Encoding: chunked\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await _read_request(reader)
                if b'"stream":true' not in request.replace(b" ", b""):
                    writer.write(answer)
                else:
                    writer.write(stream_head)
                    for piece in pieces:
                        writer.write(piece)
                        await asyncio.sleep(0)  # each is read on its own
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=1 << 20)
    await server.serve_forever()


class InstantVision(vision_pb2_grpc.VisionServicer):
    """Has one assistant; text requests need nothing else of it."""

    def ListAssistants(self, request: Any, context: Any) -> Any:
        info = vision_pb2.AssistantInfo(name=MODEL, version="sha256:" + "0" * 64)
        return vision_pb2.ListAssistantsResponse(assistants=[info])


def bare_proxy(port: int, target: str) -> None:
    """The least that passes a request and its answer on."""
    import uvicorn

    client: httpx.AsyncClient | None = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal client
        if scope["type"] != "http":
            return
        client = client or httpx.AsyncClient(base_url=target, trust_env=False, timeout=60)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        request = client.build_request(
            scope["method"], scope["path"], content=body, headers={"Content-Type": "application/json"}
        )
        answer = await client.send(request, stream=True)
        kept = [(k, v) for k, v in answer.headers.raw if k.lower() in (b"content-type", b"content-length")]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
        async for chunk in answer.aiter_raw():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off")


# The measuring side


class Side:
    """One of what is measured: where it listens, and its process."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes]) -> None:
        self.name, self.port, self.process = name, port, process

    def cpu(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


async def ask(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> tuple[float, float]:
    """Sends one request and reads its whole answer; seconds to its first event, or byte, and to its end."""
    reader, writer = connection
    began = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    fields = head.lower()
    if b"transfer-encoding: chunked" in fields:
        await reader.readuntil(b"\n\n")
        first = time.perf_counter() - began
        await reader.readuntil(b"0\r\n\r\n")
    else:
        first = time.perf_counter() - began
        await reader.readexactly(int(fields.partition(b"content-length:")[2].split(b"\r\n")[0]))
    return first, time.perf_counter() - began


async def many(side: Side, request: bytes, seconds: float) -> tuple[float, float]:
    """Requests/s over all connections, and CPU seconds of the side's process for each request."""
    connections = [await asyncio.open_connection("127.0.0.1", side.port, limit=1 << 20) for _ in range(CONNECTIONS)]
    done = 0
    end = time.perf_counter() + seconds

    async def repeat(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await ask(connection, request)
            done += 1

    cpu, began = side.cpu(), time.perf_counter()
    await asyncio.gather(*(repeat(each) for each in connections))
    rate = done / (time.perf_counter() - began)
    for _, writer in connections:
        writer.close()
    return rate, (side.cpu() - cpu) / done


async def one_by_one(side: Side, request: bytes, count: int) -> list[tuple[float, float]]:
    connection = await asyncio.open_connection("127.0.0.1", side.port, limit=1 << 20)
    found = [await ask(connection, request) for _ in range(count)]
    connection[1].close()
    return found


async def measure(sides: dict[str, Side], rounds: int, seconds: float) -> dict[str, Any]:
    requests = {"whole": _request(stream=False), "stream": _request(stream=True)}
    result: dict[str, Any] = {}
    for kind, request in requests.items():
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(1 + rounds):
            for name, side in sides.items():
                found = await many(side, request, seconds)
                if number:  # the first round warms up
                    rates[name].append(found)
        rate = {name: statistics.median(r for r, _ in rates[name]) for name in ("proxy", "gateway")}
        cpu = {name: statistics.median(c for _, c in rates[name]) for name in ("proxy", "gateway")}
        pairs = zip(rates["gateway"], rates["proxy"], strict=True)
        result[kind] = {
            "gateway_per_second": round(rate["gateway"]),
            "proxy_per_second": round(rate["proxy"]),
            "rate_ratio": round(statistics.median(g[0] / p[0] for g, p in pairs), 2),
            "gateway_cpu_ms": round(cpu["gateway"] * 1e3, 2),
            "proxy_cpu_ms": round(cpu["proxy"] * 1e3, 2),
        }
        took: dict[str, list[tuple[float, float]]] = {"gateway": [], "proxy": [], "upstream": []}
        for _ in range(rounds):
            for name in took:
                took[name] += await one_by_one(sides[name], request, 200)
        for index, until in enumerate(("first", "end")):
            for name, quantile in (("p50", 0.5), ("p99", 0.99)):
                at = {
                    side: sorted(each[index] for each in found)[int(quantile * len(found))]
                    for side, found in took.items()
                }
                for side in ("gateway", "proxy"):
                    result[kind][f"{side}_adds_{name}_ms_to_{until}"] = round((at[side] - at["upstream"]) * 1e3, 2)
    return result


def main(quick: Annotated[bool, typer.Option("--quick", help="one short round")] = False) -> None:
    load = os.getloadavg()[0]
    ports: dict[str, int] = dict(zip(("upstream", "proxy", "gateway"), _free_ports(3), strict=True))
    vision = grpc.server(futures.ThreadPoolExecutor(2))
    vision_pb2_grpc.add_VisionServicer_to_server(InstantVision(), vision)
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), vision)
    vision_port = vision.add_insecure_port("127.0.0.1:0")
    vision.start()
    target = f"http://127.0.0.1:{ports['upstream']}"
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
            "BASALT_GATEWAY_PORT": str(ports["gateway"]),
            "BASALT_VISION_ADDRESS": f"127.0.0.1:{vision_port}",
            "BASALT_LLM_URL": target,
            "BASALT_STORE": f"{directory}/objects",
            "BASALT_DATABASE": f"sqlite:///{directory}/basalt.db",
        }
        commands: dict[str, list[str]] = {
            "upstream": ["-c", f"import asyncio, gateway; asyncio.run(gateway.upstream({ports['upstream']}))"],
            "proxy": ["-c", f"import gateway; gateway.bare_proxy({ports['proxy']}, {target!r})"],
            "gateway": ["-m", "services.gateway"],
        }
        log = stack.enter_context((Path(directory) / "log").open("wb"))
        sides = {}
        for name, command in commands.items():
            process = subprocess.Popen([sys.executable, *command], env=environment, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            sides[name] = Side(name, ports[name], process)
        try:
            _wait_for(sides)
            result = asyncio.run(measure(sides, 1 if quick else 7, 1 if quick else 3))
        except Exception:
            print((Path(directory) / "log").read_text()[-3000:], file=sys.stderr)
            raise
    vision.stop(None)
    reached = all(
        kind["rate_ratio"] >= GOAL_RATE
        and kind["gateway_adds_p50_ms_to_first"] <= GOAL_P50 * 1e3
        and kind["gateway_adds_p99_ms_to_first"] <= GOAL_P99 * 1e3
        for kind in result.values()
    )
    # Of other programs: much above 0, the times say little.
    print(json.dumps({"benchmark": "gateway", **result, "load_average_before": round(load, 1), "reached": reached}))


def _wait_for(sides: dict[str, Side], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    for side in sides.values():
        while True:
            try:
                asyncio.run(one_by_one(side, _request(stream=False), 1))
                break
            except (OSError, asyncio.IncompleteReadError):
                if time.monotonic() > deadline or side.process.poll() is not None:
                    raise
                time.sleep(0.2)


async def _read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    return await reader.readexactly(length)


def _request(*, stream: bool) -> bytes:
    message = {"role": "user", "content": "What is the capital of France? Answer in one short sentence."}
    body = _compact({"model": MODEL, "messages": [message], "max_tokens": 32, "stream": stream})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _event(data: Any) -> bytes:
    return b"data: " + _compact(data) + b"\n\n"


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _compact(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def _free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return numbers


if __name__ == "__main__":
    typer.run(main)
