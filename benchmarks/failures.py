"""What clients see while parts of the stack are killed or frozen under load, and while versions are promoted.

`python benchmarks/failures.py [--quick]` ends with one line of JSON. Goals: only requests that need the dead part fail,
with 503 and within their deadline; everything recovers alone; a promotion, a canary and a rollback under load
fail nothing.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from servers import Server, Weights, free_ports, make_weights, start_basalt
from serving import QUESTIONS, Images, about

from basalt.assistants import MANIFEST, Manifest, load_assistant, seal
from basalt.object_store import ObjectStore, StoreUnavailable, open_object_store
from basalt.record.aliases import get_alias, roll_back, set_alias
from basalt.record.canaries import end_canary, set_canary
from basalt.record.database import open_database
from basalt.registry import publish

EMBED_SECONDS, LLM_SECONDS, STORE_SECONDS = 8, 24, 8  # the gateway's deadlines
DEADLINES = {"vision": EMBED_SECONDS, "llm": LLM_SECONDS, "redis": EMBED_SECONDS, "store": STORE_SECONDS}
NEEDS = {"vision": {"new"}, "llm": {"text", "new", "seen"}, "redis": set[str](), "store": {"new"}}
KINDS = ("text", "new", "seen")


@dataclass
class Result:
    kind: str
    status: int  # 0: no answer at all
    seconds: float
    at: float  # when it was asked, by the monotonic clock
    version: str


class Load:
    """One client after another of each kind, for as long as the block lasts."""

    def __init__(self, server: Server, model: str) -> None:
        self.results: list[Result] = []
        self._model = model
        self._http = httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False)
        self._images = Images(seed=time.monotonic_ns() % 1000)
        self._seen = self._images.new()

    async def __aenter__(self) -> "Load":
        self._clients = [asyncio.create_task(self._keep_asking(kind)) for kind in KINDS]
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._http.aclose()

    async def _keep_asking(self, kind: str) -> None:
        number = 0
        while True:
            number += 1
            text = f"{QUESTIONS[number % len(QUESTIONS)]} ({kind} {number})"
            content: dict[str, Any] = {"role": "user", "content": text}
            if kind != "text":
                content = about(self._images.new() if kind == "new" else self._seen, text)
            body = {"model": self._model, "messages": [content], "max_tokens": 8, "temperature": 0}
            began, status, version = time.monotonic(), 0, ""
            with suppress(httpx.HTTPError):
                response = await self._http.post("/v1/chat/completions", json=body)
                status, version = response.status_code, response.headers.get("X-Basalt-Version", "")
            self.results.append(Result(kind, status, time.monotonic() - began, began, version))
            await asyncio.sleep(0.05)

    async def all_kinds_answered(self, since: float, seconds: float = 600) -> float:
        """How long after `since` the last kind of request is answered again."""
        while time.monotonic() < since + seconds:
            good = [
                min(
                    (r.at + r.seconds for r in self.results if r.kind == k and r.at > since and r.status == 200),
                    default=0,
                )
                for k in KINDS
            ]
            if all(good):
                return max(good) - since
            await asyncio.sleep(0.2)
        return float("inf")


def start_store(var: Path) -> Server:
    """An S3 server. It keeps its objects in memory: killed, it loses them."""
    (port,) = free_ports(1)
    server = Server(f"http://127.0.0.1:{port}", "", 0)
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server.start("store", command, dict(os.environ), var / "store.log", os.cpu_count() or 1)
    return server


def prepare_store(url: str) -> ObjectStore:
    """The store, once it answers, with its bucket."""
    store = open_object_store("s3://basalt", endpoint=url, access_key="key", secret_key="secret")
    while True:
        try:
            asyncio.run(store.prepare())
            return store
        except StoreUnavailable:
            time.sleep(0.5)


async def fault(server: Server, name: str, how: str, hold: float, prepare: Callable[[], object]) -> dict[str, Any]:
    """Kills or freezes a service for `hold` seconds under load.

    Args:
        prepare: what is done when it was started again.
    """
    async with Load(server, server.model) as load:
        await load.all_kinds_answered(time.monotonic())
        family = server.family(name)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        broken = time.monotonic()
        await asyncio.sleep(hold)
        for process in family if how == "freeze" else ():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        if how == "kill":
            server.start_again(name)
            await asyncio.to_thread(prepare)
        mended = time.monotonic()
        recovered = await load.all_kinds_answered(mended)
        during = [r for r in load.results if r.at + r.seconds > broken and r.at < mended]
    failed = [r for r in during if r.status != 200]
    told = {
        "failed": dict(Counter(r.kind for r in failed)),
        "answered": dict(Counter(r.kind for r in during if r.status == 200)),
        "statuses": dict(Counter(r.status for r in failed)),
        "slowest_failure_s": round(max((r.seconds for r in failed), default=0), 1),
        "recovered_s": round(recovered, 1),
        "as_wanted": {r.kind for r in failed} <= NEEDS[name]
        and {r.status for r in failed} <= {503}
        and max((r.seconds for r in failed), default=0) < DEADLINES[name] + EMBED_SECONDS
        and recovered < 600,
    }
    print(f"{how:<7} {name:<7} {told}", flush=True)
    return told


def two_versions(weights: Weights, var: Path, store: ObjectStore) -> list[str]:
    """An assistant `watched` with two versions in the registry: what lora-1 and lora-2 are."""
    found = []
    for source in ("lora-1", "lora-2"):
        directory = var / "watched" / source
        shutil.copytree(weights.models / source, directory)
        manifest = Manifest.model_validate_json((directory / MANIFEST).read_text())
        (directory / MANIFEST).unlink()
        seal(directory, manifest.model_copy(update={"name": "watched"}))
        asyncio.run(publish(store, directory))
        found.append(load_assistant(directory).version)
    return found


async def promotion(server: Server, database: str, versions: list[str], hold: float) -> dict[str, Any]:
    """Canary, promotion and rollback of `watched` under load: who answered in each phase."""
    old, new = versions
    sessions = open_database(database)
    with sessions.begin() as session:
        set_alias(session, "watched", "production", old, expected=None)
    phases: dict[str, dict[str, int]] = {}
    async with Load(server, "watched") as load:

        async def phase(name: str) -> None:
            began = time.monotonic()
            await asyncio.sleep(hold)
            # Changes hold within a second.
            asked = [r for r in load.results if r.at > began + 1.1]
            names = {old[7:15]: "old", new[7:15]: "new"}
            phases[name] = dict(Counter(names.get(r.version.partition("@")[2][:8], "none") for r in asked))
            print(f"{name:<10} {phases[name]}", flush=True)

        await load.all_kinds_answered(time.monotonic())
        await phase("before")
        with sessions.begin() as session:
            set_canary(session, "watched", new, 0.4)
        await phase("canary")
        with sessions.begin() as session:
            set_alias(session, "watched", "production", new, expected=get_alias(session, "watched", "production"))
            end_canary(session, "watched")
        await phase("promoted")
        with sessions.begin() as session:
            roll_back(session, "watched", "production")
        await phase("rolled back")
    failed = Counter(r.status for r in load.results if r.status != 200)
    told = {"requests": len(load.results), "failed": dict(failed), "phases": phases}
    print(told, flush=True)
    return told


def main(
    quick: Annotated[bool, typer.Option("--quick", help="short phases")] = False,
    cores: Annotated[int, typer.Option(help="of the machine")] = 2,
    work: Annotated[Path, typer.Option(help="where weights are made and kept")] = Path("var/benchmark"),
) -> None:
    weights = make_weights(work)
    hold = 8.0 if quick else 20.0
    with ExitStack() as stack:
        var = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        deadlines = {"EMBED": EMBED_SECONDS, "LLM": LLM_SECONDS, "STORE": STORE_SECONDS}
        settings = {f"BASALT_GATEWAY_{name}_SECONDS": str(value) for name, value in deadlines.items()}
        s3 = start_store(var)
        stack.callback(s3.stop)
        names = {"ENDPOINT": s3.url, "ACCESS_KEY": "key", "SECRET_KEY": "secret"}
        settings |= {"BASALT_STORE": "s3://basalt"} | {f"BASALT_S3_{name}": value for name, value in names.items()}
        store = prepare_store(s3.url)
        server = start_basalt(weights, var, cores, "lora-1", **settings)
        stack.callback(server.stop)
        server.processes["store"], server.starts["store"] = s3.processes.pop("store"), s3.starts["store"]
        versions = two_versions(weights, var, store)
        found: dict[str, Any] = {
            "promotion": asyncio.run(promotion(server, f"sqlite:///{var / 'basalt.db'}", versions, hold))
        }
        prepare = {"store": lambda: prepare_store(s3.url)}
        for name in NEEDS:
            for how in ("kill", "freeze"):
                ready = prepare.get(name, lambda: None)
                found[f"{how} {name}"] = asyncio.run(fault(server, name, how, DEADLINES[name] + 4, ready))
    reached = not found["promotion"]["failed"] and all(each.get("as_wanted", True) for each in found.values())
    load = round(os.getloadavg()[0], 1)
    print(json.dumps({"benchmark": "failures", "cores": cores, "load_average": load, **found, "reached": reached}))


if __name__ == "__main__":
    typer.run(main)
