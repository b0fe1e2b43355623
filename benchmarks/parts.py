"""Parts of the serving path alone: the hand-off of embeddings to the engine, and the vision service's images/s.

`python benchmarks/parts.py [--quick]` ends with one line of JSON. The hand-off is that of an image of SigLIP-SO400M for
Llama-3-8B: 729 visual tokens of 4096 bfloat16 values, 6 MB. Goals: at most 15 ms by reference; at least 0.9 of the bare
tower's images/s at its best batch.
"""

import asyncio
import base64
import io
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import grpc
import httpx
import numpy as np
import torch
import typer
from PIL import Image
from servers import Server, make_weights, start_llm, start_vision, tiny_deep_lm

from basalt.handoff import Blob, HandoffDirectory
from basalt.rpc.vision.v1 import vision_pb2, vision_pb2_grpc

TOKENS, LM_DIM = 729, 4096
GOAL_HANDOFF_MS, GOAL_VISION = 15, 0.9


def embeddings() -> tuple[str, Blob]:
    """A digest and 6 MB, new each time."""
    values = (torch.randn(TOKENS, LM_DIM) * 0.1).to(torch.bfloat16)
    return f"sha256:{secrets.token_hex(32)}", Blob(
        values.view(torch.uint8).numpy().tobytes(), (TOKENS, LM_DIM), "bfloat16"
    )


def handoff(server: Server, directory: HandoffDirectory, rounds: int) -> dict[str, float]:
    """Milliseconds, medians: the write, and what an image's request takes longer than a text of as many tokens."""
    times: dict[str, list[float]] = {"write": [], "text": [], "reference": [], "base64": []}
    words = [f" {number}" for number in range(10)]
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:

        def ask(content: object) -> float:
            body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
            payload = json.dumps(body).encode()
            began = time.perf_counter()
            response = client.post(
                "/v1/chat/completions", content=payload, headers={"Content-Type": "application/json"}
            )
            assert response.is_success, response.text
            return time.perf_counter() - began

        for number in range(rounds + 2):
            digest, blob = embeddings()
            began = time.perf_counter()
            directory.put(digest, blob)
            written = time.perf_counter() - began
            reference = ask([{"type": "image_embeds", "image_embeds": digest, "uuid": digest}])
            other, blob = embeddings()
            encoded = base64.b64encode(blob.header() + blob.data).decode()
            inline = ask([{"type": "image_embeds", "image_embeds": encoded, "uuid": other}])
            text = ask("".join(words[secrets.randbelow(10)] for _ in range(TOKENS // 2)))
            if number >= 2:
                for name, value in zip(times, (written, text, reference, inline), strict=True):
                    times[name].append(value * 1000)
    found = {name: statistics.median(values) for name, values in times.items()}
    return {
        "write_ms": round(found["write"], 2),
        "reference_ms": round(found["write"] + found["reference"] - found["text"], 2),
        "base64_ms": round(found["base64"] - found["text"], 2),
    }


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


BARE = """
import json, sys, time, torch
from pathlib import Path
from basalt.assistants import load_assistants
from basalt.model.precision import dtype_of
from basalt.model.vision_encoder import load_vision_encoder
models, threads = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
spec, cpu = load_assistants(models)["plain"].manifest.tower, torch.device("cpu")
tower = load_vision_encoder(spec).to(cpu, dtype_of("auto", cpu))
print("ready", flush=True)
for line in sys.stdin:
    batch, passes = map(int, line.split())
    pixels = torch.randn(batch, 3, 384, 384)
    with torch.inference_mode():
        began = time.perf_counter()
        for _ in range(passes):
            tower(pixels)
    print(batch * passes / (time.perf_counter() - began), flush=True)
"""


async def vision(server: Server, bare: Callable[[int, int], float], rounds: int, images: int) -> dict[str, float]:
    """Images/s of the service with 16 requests in flight, and of the tower alone at its best batch, in turn."""
    await asyncio.to_thread(bare, 1, 2)
    best = max((1, 4), key=lambda batch: bare(batch, max(1, 8 // batch)))
    ours: list[float] = []
    theirs: list[float] = []
    seed = secrets.randbelow(10**6) * 1000
    async with grpc.aio.insecure_channel(server.url) as channel:
        stub = vision_pb2_grpc.VisionStub(channel)
        in_flight = asyncio.Semaphore(16)

        async def embed(data: bytes) -> None:
            async with in_flight:
                await stub.Embed(
                    vision_pb2.EmbedRequest(assistant="plain", image_bytes=data, by_reference=True), timeout=300
                )

        await embed(jpeg(seed))
        for number in range(rounds):
            batch = [jpeg(seed + 1 + number * images + n) for n in range(images)]
            began = time.perf_counter()
            await asyncio.gather(*map(embed, batch))
            ours.append(images / (time.perf_counter() - began))
            theirs.append(await asyncio.to_thread(bare, best, max(1, images // best)))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "service_images_per_s": round(statistics.median(ours), 3),
        "bare_images_per_s": round(statistics.median(theirs), 3),
        "best_batch": best,
        "ratio": round(ratio, 3),
    }


def main(
    quick: Annotated[bool, typer.Option("--quick", help="few rounds")] = False,
    cores: Annotated[int, typer.Option(help="of the machine, for the services")] = 2,
    work: Annotated[Path, typer.Option(help="where weights are made and kept")] = Path("var/benchmark"),
) -> None:
    load = os.getloadavg()[0]
    weights = make_weights(work)
    with ExitStack() as stack:
        var = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        server = start_vision(weights, var, shared, cores)
        stack.callback(server.stop)
        process = subprocess.Popen(
            [sys.executable, "-c", BARE, str(weights.models), str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(cores)},
            preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
        )
        stack.callback(process.terminate)
        assert process.stdin and process.stdout
        requests, answers = process.stdin, process.stdout
        answers.readline()

        def bare(batch: int, passes: int) -> float:
            requests.write(f"{batch} {passes}\n")
            requests.flush()
            return float(answers.readline())

        seen: dict[str, Any] = {"vision": asyncio.run(vision(server, bare, 2 if quick else 4, 48))}
        print(seen, flush=True)
    with ExitStack() as stack:
        var = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        base_lm = tiny_deep_lm(work, LM_DIM)
        server = start_llm(base_lm, var, shared, cores)
        stack.callback(server.stop)
        seen["handoff"] = handoff(server, HandoffDirectory(shared, 256 << 20), 5 if quick else 30)
    reached = {
        "handoff": seen["handoff"]["reference_ms"] <= GOAL_HANDOFF_MS,
        "vision": seen["vision"]["ratio"] >= GOAL_VISION,
    }
    print(
        json.dumps(
            {"benchmark": "parts", "cores": cores, "load_average_before": round(load, 1), **seen, "reached": reached}
        )
    )


if __name__ == "__main__":
    typer.run(main)
