"""What the evaluator itself costs: its rate against a bare asyncio loop's on the same server, and rescoring.

`python benchmarks/evaluator.py [--quick] [--url http://HOST:PORT/v1 --model NAME]` asks a server of its own, which
answers so many requests at once and no more, or the one that is named. The evaluator finds its concurrency on some
questions; then it and a bare loop of the same requests take turns at that concurrency, on new questions each time. Then
MMMU samples are answered, scored again from their run's directory, and run again from kept answers. Ends with one line
of JSON. Goals: at least 95 % of the bare loop's rate; 10,000 samples rescored within 10 s.
"""

import asyncio
import base64
import io
import json
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import typer
import uvicorn
from fastapi import FastAPI, Request, Response
from PIL import Image

from basalt.eval.asking import Asker, Question
from basalt.eval.endpoint import Endpoint, encode
from basalt.eval.run import Task, evaluate, rescore
from basalt.record.database import open_database

GOAL_SHARE, GOAL_SECONDS = 0.95, 10.0
SLOTS, ANSWER_SECONDS = 8, 0.1  # of the server of its own
DECODING = {"temperature": 0, "max_tokens": 16}
MODEL = "m"


def serve(listener: socket.socket) -> None:
    """A server that answers `SLOTS` requests at once in `ANSWER_SECONDS` each; those without a picture at once."""
    app, slots = FastAPI(), asyncio.Semaphore(SLOTS)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": MODEL, "version": "1"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if b'"image_url"' in await request.body():
            async with slots:
                await asyncio.sleep(ANSWER_SECONDS)
        message = {"role": "assistant", "content": "(B)"}
        body = {
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 700, "completion_tokens": 3},
            "system_fingerprint": "fp",
        }
        return Response(json.dumps(body), media_type="application/json")

    asyncio.run(uvicorn.Server(uvicorn.Config(app, log_level="error")).serve([listener]))


def questions(count: int, first: int) -> list[Question]:
    """About one picture of about 100 kB."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

    def messages(number: int) -> list[dict[str, Any]]:
        shown = {"type": "image_url", "image_url": {"url": url}}
        return [{"role": "user", "content": [shown, {"type": "text", "text": f"Question {number}: what is it?"}]}]

    return [Question(str(n), lambda n=n: messages(n)) for n in range(first, first + count)]


async def bare(endpoint: Endpoint, asked: list[Question], concurrency: int) -> float:
    """Answers a second of a loop that does nothing else."""
    bodies = [encode(endpoint.model, question.messages(), DECODING) for question in asked]

    async def work(client: httpx.AsyncClient) -> None:
        while bodies:
            body = bodies.pop()
            response = await client.post("chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 200 and response.json()["choices"]

    async with endpoint.client(concurrency) as client:
        began = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(concurrency)))
        return len(asked) / (time.perf_counter() - began)


async def overhead(endpoint: Endpoint, folder: Path, count: int, rounds: int) -> dict[str, Any]:
    sessions = open_database(f"sqlite:///{folder}/overhead.db")
    async with Asker(endpoint, DECODING, sessions).open() as asker:
        found = await asker.ask(questions(count, 0))
        ours, theirs, cpu, next_question = [], [], [], count
        for _ in range(rounds):
            asked = questions(count, next_question)
            before = time.process_time()
            result = await asker.ask(asked)
            cpu.append((time.process_time() - before) / count)
            ours.append(result.progress.asked / result.progress.seconds)
            theirs.append(await bare(endpoint, questions(count, next_question + count), asker.pace.knee))
            next_question += 2 * count
    return {
        "concurrency_found": asker.pace.knee,
        "rate_while_finding": found.progress.asked / found.progress.seconds,
        "rate": statistics.median(ours),
        "bare_rate": statistics.median(theirs),
        "share": statistics.median(ours) / statistics.median(theirs),
        "cpu_ms_per_answer": 1000 * statistics.median(cpu),
    }


def write_mmmu(path: Path, count: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": "p.png"}
    rows = [
        {
            "id": f"validation_{('Math', 'Art', 'Physics')[n % 3]}_{n}",
            "question": f"Which of these is it in case {n}? <image 1>",
            "options": "['the first of them', 'the second of them', 'the third', 'none']" if n % 10 else "[]",
            "answer": "ABCD"[n % 4] if n % 10 else "42",
            "question_type": "multiple-choice" if n % 10 else "open",
            "image_1": image,
        }
        for n in range(count)
    ]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = [name for name in rows[0] if name != "image_1"]
    schema = pa.schema([(name, pa.string()) for name in names] + [(f"image_{n}", picture) for n in range(1, 8)])
    parquet.write_table(pa.Table.from_pylist(rows, schema), path)


def rescoring(endpoint: Endpoint, folder: Path, count: int) -> dict[str, Any]:
    data, database = folder / "validation.parquet", f"sqlite:///{folder}/rescoring.db"
    write_mmmu(data, count)

    def run() -> float:
        began = time.perf_counter()
        sessions = open_database(database)
        asyncio.run(evaluate(Task("mmmu", data, blind=True), endpoint, folder / "run", sessions))
        return time.perf_counter() - began

    asked = run()
    began = time.perf_counter()
    rescore(folder / "run")
    rescored = time.perf_counter() - began
    return {
        "rescored_samples": count,
        "asking_seconds": asked,
        "rescore_seconds": rescored,
        "run_from_kept_answers_seconds": run(),
    }


def main(
    quick: Annotated[bool, typer.Option("--quick", help="fewer questions")] = False,
    url: Annotated[str | None, typer.Option(help="a server to ask instead, with its /v1")] = None,
    model: Annotated[str, typer.Option(help="its model")] = MODEL,
) -> None:
    count, rounds, samples = (240, 3, 1_000) if quick else (600, 5, 10_000)
    listener = socket.create_server(("127.0.0.1", 0))
    server = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
    server.start()
    own = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", MODEL)
    asked = Endpoint(url, model, os.environ.get("BASALT_API_KEY", "")) if url else own
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(overhead(asked, Path(folder), count, rounds))
        figures |= rescoring(own, Path(folder), samples)
    server.terminate()
    figures |= {
        "benchmark": "evaluator",
        "questions": count,
        "server": {"url": url} if url else {"slots": SLOTS, "answer_seconds": ANSWER_SECONDS},
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "cpus": os.cpu_count(),
        "goals_met": {
            "share": figures["share"] >= GOAL_SHARE,
            "rescore": figures["rescore_seconds"] <= GOAL_SECONDS * samples / 10_000,
        },
    }
    print(json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in figures.items()}))


if __name__ == "__main__":
    typer.run(main)
