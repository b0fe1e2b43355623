"""Hours of use: every kind of request without pause, and what memory and descriptors do meanwhile.

`python benchmarks/soak.py [--minutes N] [--quick]` starts what `make up` starts, with caches small enough to be full
soon, and ends with one line of JSON. Goals: no request fails; from the middle third to the last, memory (PSS) grows by
less than 2 % and no process holds more descriptors but for those of a request.
"""

import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import psutil
import typer
from serving import Images, about
from up import MODEL, families, launched, pss

MEBI = 2**20
GOAL_GROWTH, GOAL_DESCRIPTORS = 0.02, 6
SMALL_CACHES = {
    "BASALT_VISION_FEATURE_CACHE_BYTES": str(8 * MEBI),
    "BASALT_VISION_EMBEDDING_CACHE_BYTES": str(8 * MEBI),
    "BASALT_VISION_SHARED_CACHE_BYTES": str(8 * MEBI),
    "BASALT_GATEWAY_ALLOW_PRIVATE_HOSTS": "127.0.0.1",
}


@dataclass
class Sample:
    """Of all processes by service: bytes (PSS) and open descriptors."""

    memory: dict[str, int] = field(default_factory=dict)
    descriptors: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, launcher: psutil.Process) -> "Sample":
        sample = cls()
        for name, family in families(launcher).items():
            sample.memory[name] = sum(map(pss, family))
            sample.descriptors[name] = sum(each.num_fds() for each in family)
        return sample


class Users:
    """Each asks one kind of thing, again and again."""

    def __init__(self, url: str) -> None:
        self.http = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False)
        self.images = Images(seed=7)
        self.seen = [self.images.new() for _ in range(4)]
        self.answered: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    async def run(self, until: float) -> None:
        kinds: dict[str, Callable[[], Awaitable[int]]] = {
            "text": lambda: self.chat([{"role": "user", "content": "Say something about the sea."}]),
            "new image": lambda: self.chat([about(self.images.new(), "Describe the image.")]),
            "seen image": lambda: self.chat([about(random.choice(self.seen), f"What is at {random.random():.3f}?")]),
            "turns": self.turns,
            "leaves": self.leaves,
            "refused": self.refused,
            "response": self.response,
        }

        async def user(kind: str) -> None:
            while time.monotonic() < until:
                try:
                    status = await kinds[kind]()
                except httpx.HTTPError as error:
                    self.failed[f"{kind}: {type(error).__name__}"] += 1
                    continue
                self.answered[kind] += status == 200
                if status != 200:
                    self.failed[f"{kind}: {status}"] += 1

        await asyncio.gather(*map(user, kinds))
        await self.http.aclose()

    async def chat(self, messages: list[Any], **more: Any) -> int:
        body = {"model": MODEL, "messages": messages, "max_tokens": 24, "stream": True} | more
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if '"error"' in line:
                    return 500
        return response.status_code

    async def turns(self) -> int:
        image = about(self.images.new(), "What is this?")
        said = {"role": "assistant", "content": "Colours, flowing into each other."}
        return await self.chat([image, said, {"role": "user", "content": "Which ones?"}])

    async def leaves(self) -> int:
        """In the middle of an answer."""
        body = {"model": MODEL, "messages": [about(random.choice(self.seen), "Tell a story.")], "stream": True}
        async with self.http.stream("POST", "/v1/chat/completions", json=body | {"ignore_eos": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    break
        await asyncio.sleep(0.5)
        return response.status_code

    async def refused(self) -> int:
        """No image at all behind the URL: the right answer is 400."""
        response = await self.http.post(
            "/v1/chat/completions",
            json={"model": MODEL, "messages": [about("data:image/png;base64,AAAA", "What is this?")]},
        )
        await asyncio.sleep(0.5)
        return 200 if response.status_code == 400 else response.status_code

    async def response(self) -> int:
        body = {"model": MODEL, "input": "Name a colour.", "max_output_tokens": 8, "store": False}
        return (await self.http.post("/v1/responses", json=body)).status_code


async def soak(launcher: psutil.Process, url: str, seconds: float) -> dict[str, Any]:
    users, samples = Users(url), list[Sample]()
    began = time.monotonic()
    asking = asyncio.create_task(users.run(began + seconds))
    while not asking.done():
        await asyncio.wait({asking}, timeout=max(1.0, seconds / 60))
        samples.append(await asyncio.to_thread(Sample.of, launcher))
    third = len(samples) // 3

    def grown(of: Callable[[Sample], float]) -> tuple[float, float]:
        """The middle third's median, and what the last third's is more."""
        middle, last = (statistics.median(map(of, part)) for part in (samples[third : 2 * third], samples[2 * third :]))
        return middle, last - middle

    memory = {name: grown(lambda sample: sample.memory.get(name, 0)) for name in samples[-1].memory}  # noqa: B023
    descriptors = {name: grown(lambda sample: sample.descriptors.get(name, 0)) for name in samples[-1].memory}  # noqa: B023
    total, growth = grown(lambda sample: sum(sample.memory.values()))
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "answered": dict(users.answered),
        "failed": dict(users.failed),
        "memory_mib": {name: [round(value / MEBI, 1) for value in values] for name, values in memory.items()},
        "descriptors": {name: list(map(round, values)) for name, values in descriptors.items()},
        "memory_growth": round(growth / total, 4),
        "descriptors_growth": max(round(more) for _, more in descriptors.values()),
    }


def main(
    minutes: Annotated[float, typer.Option(help="of use")] = 60,
    quick: Annotated[bool, typer.Option("--quick", help="two minutes")] = False,
) -> None:
    load = round(os.getloadavg()[0], 1)
    with launched(**SMALL_CACHES) as (launcher, url, _):
        found = asyncio.run(soak(launcher, url, 120 if quick else minutes * 60))
    reached = {
        "failed": not found["failed"],
        "memory": found["memory_growth"] < GOAL_GROWTH,
        "descriptors": found["descriptors_growth"] <= GOAL_DESCRIPTORS,
    }
    print(json.dumps({"benchmark": "soak", "load_average_before": load, **found, "reached": reached}))


if __name__ == "__main__":
    typer.run(main)
