"""Basalt against vLLM's own monolithic LLaVA server: the same weights, the same machine, the same run.

`python benchmarks/serving.py [SCENARIO …] [--quick]` starts both sides, measures them in turn, round by round, so that
other work on the machine meets both alike, and ends with one line of JSON. See docs/serving-figures.md.
"""

import asyncio
import base64
import io
import json
import os
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from PIL import Image
from servers import Server, make_weights, peer_python, start_basalt, start_peer

QUESTIONS = (
    "What is in this image? Answer in one short sentence.",
    "Which colours do you see, and where are they?",
    "Is there anything in the image that moves?",
    "What could have happened just before this picture was taken?",
)
ONE_LORA = {"BASALT_LLM_MAX_LORAS": "1", "BASALT_LLM_MAX_KEPT_LORAS": "1"}
NO_CACHES = {
    "BASALT_VISION_FEATURE_CACHE_BYTES": "0",
    "BASALT_VISION_EMBEDDING_CACHE_BYTES": "0",
    "BASALT_VISION_SHARED_CACHE_BYTES": "0",
}
DIGITS = range(32, 42)  # the tokens 0 … 9 of SmolLM2's vocabulary
SYSTEM = "You look at pictures and answer questions about them, briefly and to the point."


@dataclass
class Answer:
    """What came back for one request, and when."""

    first: float  # seconds to the first token
    total: float  # seconds to the end
    cpu: float  # seconds of all the side's processes meanwhile
    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Client:
    """Asks one side, streaming."""

    def __init__(self, server: Server) -> None:
        self.server = server
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False, limits=limits)

    async def ask(
        self, messages: list[Any], tokens: int, model: str | None = None, *, digits_only: bool = False
    ) -> Answer:
        body = {
            "model": model or self.server.model,
            "messages": [{"role": "system", "content": SYSTEM}, *messages],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,  # every answer as long as the other side's
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.server.salted:  # no prefix is another request's
            body["cache_salt"] = secrets.token_hex(8)
        if digits_only:  # they tokenise one by one, so that an answer sent back is the same tokens
            body["logit_bias"] = dict.fromkeys(map(str, DIGITS), 100)
        content = json.dumps(body).encode()
        text, usage, first = "", {}, None
        cpu = self.server.cpu_seconds()
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        async with self.http.stream("POST", "/v1/chat/completions", content=content, headers=headers) as response:
            if not response.is_success:
                raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:500]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event))
                if event["choices"]:
                    first = first or time.perf_counter() - began
                    text += event["choices"][0]["delta"].get("content") or ""
                usage = event.get("usage") or usage
        assert first is not None, "no event held a choice"
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        total = time.perf_counter() - began
        cpu = self.server.cpu_seconds() - cpu
        return Answer(first, total, cpu, text, usage["prompt_tokens"], cached, usage["completion_tokens"])


def picture(seed: int) -> str:
    """A data: URL of a 640 × 480 JPEG, as smooth as a photograph, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def about(url: str, question: str) -> dict[str, Any]:
    """The user's message about one image."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"role": "user", "content": parts}


class Images:
    """New images, none of them twice."""

    def __init__(self, seed: int) -> None:
        self._next = seed * 1_000_000

    def new(self) -> str:
        self._next += 1
        return picture(self._next)


async def new_image(client: Client, images: Images) -> dict[str, float]:
    """Time to the first token of a question about an image never seen."""
    answer = await client.ask([about(images.new(), QUESTIONS[0])], tokens=1)
    return {"ttft": answer.first, "cpu_s": answer.cpu}


async def seen_image(client: Client, images: Images) -> dict[str, float]:
    """Time to the first token of a new question about an image seen before."""
    url = images.new()
    await client.ask([about(url, QUESTIONS[0])], tokens=1)
    answer = await client.ask([about(url, QUESTIONS[1])], tokens=1)
    return {"ttft": answer.first, "cpu_s": answer.cpu}


async def concurrent_new(client: Client, images: Images) -> dict[str, float]:
    """Twelve new images at once, 32 tokens each."""
    asked = [client.ask([about(url, QUESTIONS[0])], tokens=32) for url in [images.new() for _ in range(12)]]
    began = time.perf_counter()
    answers = await asyncio.gather(*asked)
    seconds = time.perf_counter() - began
    return {"requests_per_s": 12 / seconds, "ttft": statistics.median(a.first for a in answers)}


async def mixed_load(client: Client, images: Images) -> dict[str, float]:
    """Eight clients, each two conversations of four turns; seven of ten conversations are about three known images."""
    known = [images.new() for _ in range(3)]
    for url in known:
        await client.ask([about(url, QUESTIONS[0])], tokens=1)
    draw = random.Random(5)
    chosen = [[draw.choice(known) if draw.random() < 0.7 else images.new() for _ in range(2)] for _ in range(8)]
    firsts: list[float] = []

    async def converse(url: str, user: int) -> None:
        messages: list[Any] = []
        for turn, question in enumerate(QUESTIONS):
            question = f"{question} (reader {user})"
            messages.append(about(url, question) if turn == 0 else {"role": "user", "content": question})
            answer = await client.ask(messages, tokens=24)
            firsts.append(answer.first)
            messages.append({"role": "assistant", "content": answer.text})

    async def user(number: int) -> None:
        for url in chosen[number]:
            await converse(url, number)

    began = time.perf_counter()
    await asyncio.gather(*(user(number) for number in range(8)))
    seconds = time.perf_counter() - began
    return {"requests_per_s": len(firsts) / seconds, "ttft": statistics.median(firsts)}


async def second_turn(client: Client, images: Images) -> dict[str, float]:
    """How much of the first turn's full blocks, answer included, the second turn finds in the cache."""
    block = client.server.block
    url = images.new()
    first = await client.ask([about(url, QUESTIONS[0])], tokens=200, digits_only=True)
    again = [about(url, QUESTIONS[0]), {"role": "assistant", "content": first.text}]
    second = await client.ask([*again, {"role": "user", "content": QUESTIONS[1]}], tokens=1)
    # The last token of an answer is told and never run through the model.
    full = (first.prompt_tokens + first.completion_tokens - 1) // block * block
    return {"cached_tokens": second.cached_tokens, "share_of_full_blocks": second.cached_tokens / full}


async def text_while_images(client: Client, images: Images) -> dict[str, float]:
    """Four texts of 96 tokens at once, alone and beside new images, a quarter as many as the side could answer: seconds
    per token."""

    async def write() -> float:
        asked = [client.ask([{"role": "user", "content": f"Tell me a story about {n}."}], tokens=96) for n in range(4)]
        answers = await asyncio.gather(*asked)
        return statistics.median((each.total - each.first) / (each.completion_tokens - 1) for each in answers)

    written = asyncio.Event()

    async def show_images() -> None:
        async with asyncio.TaskGroup() as arrived:
            while not written.is_set():
                arrived.create_task(client.ask([about(images.new(), QUESTIONS[0])], tokens=1))
                with suppress(TimeoutError):
                    await asyncio.wait_for(written.wait(), 4 * image.first)

    image = await client.ask([about(images.new(), QUESTIONS[0])], tokens=1)
    alone = await write()
    showing = asyncio.create_task(show_images())
    beside_images = await write()
    written.set()
    await showing
    slowdown = beside_images / alone
    return {"tpot": alone, "tpot_beside_images": beside_images, "slowdown": slowdown, "image_every": 4 * image.first}


async def many_assistants(client: Client, images: Images) -> dict[str, float]:
    """Sixteen new images, eight at a time, 32 tokens each, asked of the side's assistants in turn."""
    models = client.server.models or [client.server.model]
    in_flight = asyncio.Semaphore(8)

    async def ask(number: int, url: str) -> None:
        async with in_flight:
            await client.ask([about(url, QUESTIONS[0])], tokens=32, model=models[number % len(models)])

    urls = [images.new() for _ in range(16)]
    began = time.perf_counter()
    await asyncio.gather(*(ask(number, url) for number, url in enumerate(urls)))
    seconds = time.perf_counter() - began
    return {"requests_per_s": 16 / seconds, "memory_gib": client.server.memory() / 2**30}


async def reused_images(client: Client, images: Images) -> dict[str, float]:
    """Four clients, five questions each, four of five about five known images; 16 tokens each."""
    known = [images.new() for _ in range(5)]
    for url in known:
        await client.ask([about(url, QUESTIONS[0])], tokens=1)
    draw = random.Random(7)
    urls = [known[draw.randrange(5)] if number % 5 else images.new() for number in range(20)]
    answers: list[Answer] = []

    async def user(number: int) -> None:
        for turn, url in enumerate(urls[number::4]):
            answers.append(await client.ask([about(url, f"{QUESTIONS[turn % 4]} ({number})")], tokens=16))

    began = time.perf_counter()
    await asyncio.gather(*(user(number) for number in range(4)))
    seconds = time.perf_counter() - began
    return {"requests_per_s": 20 / seconds, "ttft": statistics.fmean(a.first for a in answers)}


Scenario = Callable[[Client, Images], Awaitable[dict[str, float]]]
# Each with its rounds, in quick runs and else.
SCENARIOS: dict[str, tuple[Scenario, int, int]] = {
    "new_image": (new_image, 3, 25),
    "seen_image": (seen_image, 3, 25),
    "concurrent_new": (concurrent_new, 1, 4),
    "mixed_load": (mixed_load, 1, 3),
    "second_turn": (second_turn, 1, 2),
    "text_while_images": (text_while_images, 2, 6),
}
# Of Basalt against itself: its eight assistants against one, its caches on against off.
OWN: dict[str, tuple[Scenario, int, int]] = {
    "many_assistants": (many_assistants, 1, 4),
    "reused_images": (reused_images, 1, 4),
}
# Of Basalt divided by its peer, or of Basalt alone.
GOALS = {
    ("new_image", "ratio", "ttft"): ("at most", 1.05),
    ("seen_image", "ratio", "ttft"): ("at most", 0.8),
    ("concurrent_new", "ratio", "requests_per_s"): ("at least", 1.0),
    ("mixed_load", "ratio", "requests_per_s"): ("at least", 1.5),
    ("second_turn", "basalt", "share_of_full_blocks"): ("at least", 0.95),
    ("text_while_images", "basalt", "slowdown"): ("at most", 1.05),
    ("many_assistants", "ratio", "requests_per_s"): ("at least", 0.85),
    ("many_assistants", "ratio", "memory_gib"): ("at most", 1.3),
    ("reused_images", "ratio", "requests_per_s"): ("at least", 1.15),
    ("reused_images", "ratio", "ttft"): ("at most", 0.7),
}


async def compare(name: str, sides: dict[str, Client], quick: bool) -> dict[str, dict[str, float]]:
    """Medians over the rounds but the first, by metric, of every side, the others frozen meanwhile."""
    scenario, few, many = (SCENARIOS | OWN)[name]
    images = {side: Images(seed=1 + hash_of(name)) for side in sides}
    found: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    for number in range(1 + (few if quick else many)):
        for side in sorted(sides, reverse=number % 2 == 1):
            server = sides[side].server
            server.thaw()
            result = await scenario(sides[side], images[side])
            server.freeze()
            for metric, value in result.items() if number else ():
                found[side].setdefault(metric, []).append(value)
    medians = {
        side: {metric: round(statistics.median(values), 4) for metric, values in metrics.items()}
        for side, metrics in found.items()
    }
    if len(sides) == 2:
        ours, theirs = (medians[side] for side in sides)
        medians["ratio"] = {metric: round(ours[metric] / theirs[metric], 3) for metric in ours}
    return medians


def hash_of(name: str) -> int:
    return sum(map(ord, name))


async def measure(scenarios: list[str], servers: dict[str, Server], quick: bool) -> dict[str, Any]:
    sides = {side: Client(server) for side, server in servers.items()}
    for server in servers.values():
        server.freeze()
    found = {}
    for name in scenarios:
        found[name] = await compare(name, sides, quick)
        for side, metrics in found[name].items():
            told = "  ".join(f"{metric} {value:.3f}" for metric, value in metrics.items())
            print(f"{name:<16} {side:<8} {told}", flush=True)
    return found


@contextmanager
def started() -> Iterator[Callable[[Callable[[Path], Server]], Server]]:
    """Starts servers, each with a directory of its own, and stops them all at the end."""
    with ExitStack() as stack:

        def start(make: Callable[[Path], Server]) -> Server:
            server = make(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            stack.callback(server.stop)
            return server

        yield start


def main(
    scenarios: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(SCENARIOS | OWN)}; all if none")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few rounds")] = False,
    peer: Annotated[bool, typer.Option(help="compare with vLLM's own server")] = True,
    cores: Annotated[int, typer.Option(help="of the machine, for either side")] = 2,
    work: Annotated[Path, typer.Option(help="where weights and the peer's Python are made and kept")] = Path(
        "var/benchmark"
    ),
) -> None:
    load = os.getloadavg()[0]
    weights = make_weights(work)
    scenarios = scenarios or [*SCENARIOS, *OWN]
    found: dict[str, Any] = {}
    if wanted := [name for name in scenarios if name in SCENARIOS]:
        with started() as start:
            servers = {"basalt": start(lambda var: start_basalt(weights, var, cores))}
            if peer:
                python = peer_python(work / "peer-python")
                servers["peer"] = start(lambda var: start_peer(weights, python, var, cores))
            found |= asyncio.run(measure(wanted, servers, quick))
            found["memory_gib"] = {side: round(server.memory() / 2**30, 2) for side, server in servers.items()}
    if "many_assistants" in scenarios:
        with started() as start:
            servers = {
                "eight": start(lambda var: start_basalt(weights, var, cores, "lora-1")),
                "one": start(lambda var: start_basalt(weights.only("lora-1", var), var, cores, "lora-1", **ONE_LORA)),
            }
            servers["eight"].models = [f"lora-{number}" for number in range(1, 9)]
            found |= asyncio.run(measure(["many_assistants"], servers, quick))
    if "reused_images" in scenarios:
        with started() as start:
            servers = {
                "on": start(lambda var: start_basalt(weights, var, cores)),
                "off": start(lambda var: start_basalt(weights, var, cores, **NO_CACHES)),
            }
            servers["off"].salted = True
            found |= asyncio.run(measure(["reused_images"], servers, quick))
    reached = {
        f"{name} {metric}": value <= goal if bound == "at most" else value >= goal
        for (name, side, metric), (bound, goal) in GOALS.items()
        if (value := found.get(name, {}).get(side, {}).get(metric)) is not None
    }
    print(
        json.dumps(
            {"benchmark": "serving", "cores": cores, "load_average_before": round(load, 1), **found, "reached": reached}
        )
    )


if __name__ == "__main__":
    typer.run(main)
