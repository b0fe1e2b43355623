"""Whole runs: from a benchmark's file to answers, scores and a manifest, through kills, failures and other parsers."""

import asyncio
import io
import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from fastapi import Response
from PIL import Image
from sqlalchemy import select
from typer.testing import CliRunner

from basalt.cli import app
from basalt.data.readers import DataError
from basalt.eval.endpoint import Endpoint
from basalt.eval.run import Result, Task, evaluate, fetch, rescore
from basalt.object_store import DirectoryStore
from basalt.record.answers import Answer
from basalt.record.database import open_database
from tests.eval.one_run import run as run_to_be_killed
from tests.eval.openai_shaped import Server, completion, serving, text_of


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_vqa(folder: Path, count: int) -> Path:
    """Questions of one's own, each "q<n>" with the answer "a<n>" and one of two pictures."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for colour in ("red", "blue"):
        (pictures / f"{colour}.png").write_bytes(png(colour))
    rows = [
        {"id": str(n), "image": ("red.png", "blue.png")[n % 2], "question": f"q{n}", "answer": f"a{n}"}
        for n in range(count)
    ]
    path = folder / "questions.json"
    path.write_text(json.dumps(rows))
    return path


def write_mmmu(path: Path) -> Path:
    rows = [
        {
            "id": f"validation_Math_{number}",
            "question": f"Which is it, number {number}? <image 1>",
            "options": "['one', 'two', 'three']",
            "answer": "ABC"[number % 3],
            "question_type": "multiple-choice",
            **{f"image_{n}": {"bytes": png("red"), "path": "p.png"} if n == 1 else None for n in range(1, 8)},
        }
        for number in range(6)
    ]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = ["id", "question", "options", "answer", "question_type"]
    schema = pa.schema([(name, pa.string()) for name in text] + [(f"image_{n}", picture) for n in range(1, 8)])
    parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


async def knows_all(body: dict[str, Any], _: int) -> Response:
    return completion(text_of(body).replace("q", "a"))


def run(server: Server, folder: Path, task: Task, **options: Any) -> Result:
    sessions = open_database(f"sqlite:///{folder}/basalt.db")
    return asyncio.run(evaluate(task, Endpoint(server.url, "m"), folder / "run", sessions, **options))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_as_a_user_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASALT_DATABASE", f"sqlite:///{tmp_path}/basalt.db")
    monkeypatch.setenv("BASALT_BENCHMARKS", str(tmp_path / "home"))
    (tmp_path / "home/mmmu").mkdir(parents=True)
    data = write_mmmu(tmp_path / "home/mmmu/validation.parquet")
    out, blind = tmp_path / "run", tmp_path / "blind"

    async def always_a(body: dict[str, Any], _: int) -> Response:
        seen = any(part["type"] == "image_url" for part in body["messages"][0]["content"])
        return completion("A" if seen else "B")

    with serving(always_a) as server:
        command = ["eval", "run", "mmmu", "--data", str(data), "--model", "m", "--url", server.url]
        first = CliRunner().invoke(app, [*command, "--out", str(out)])
        assert first.exit_code == 0, first.output
        assert "official: accuracy 33.3" in first.output and "strict: accuracy 33.3" in first.output
        hashed = json.loads((out / "scores.json").read_text())["hash"]
        assert f"`{hashed.removeprefix('sha256:')[:16]}`" in (out / "report.md").read_text()
        again = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "again"), "--json"])
        assert json.loads(again.stdout)["hash"] == hashed
        assert sum(server.asked.values()) == 6
        kept = ["eval", "run", "mmmu", "--model", "m", "--url", server.url, "--out", str(tmp_path / "kept"), "--json"]
        from_home = CliRunner().invoke(app, kept)
        assert json.loads(from_home.stdout)["scores"] == json.loads(again.stdout)["scores"]
        assert sum(server.asked.values()) == 6
        absent = CliRunner().invoke(app, ["eval", "run", "pope", "--model", "m", "--url", server.url])
        assert absent.exit_code == 1 and "home/pope: put the benchmark's published files there" in absent.output
        sightless = CliRunner().invoke(app, [*command, "--out", str(blind), "--blind", "--json", "--limit", "4"])
        assert json.loads(sightless.stdout)["answered"] == 4
        assert {one["prediction"] for one in lines(blind / "answers.jsonl")} == {"B"}
        assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0, 128)}
    scored = CliRunner().invoke(app, ["eval", "rescore", str(out), "--json"])
    assert json.loads(scored.stdout)["hash"] == hashed
    by_hand = CliRunner().invoke(
        app, ["eval", "score", "mmmu", "--data", str(data), "--predictions", str(out / "answers.jsonl"), "--json"]
    )
    assert json.loads(by_hand.stdout)["scores"] == json.loads(scored.stdout)["scores"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == {"model": "m", "version": "1", "fingerprint": "fp-1"}
    assert manifest["hash"] != json.loads((blind / "manifest.json").read_text())["hash"]


@pytest.mark.slow
def test_killed_at_twenty_moments_it_asks_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    data = write_vqa(tmp_path, 600)
    slots = asyncio.Semaphore(6)
    url = f"sqlite:///{tmp_path}/killed.db"
    sessions, draw = open_database(url), random.Random(7)
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(["tests.eval.one_run"])

    async def slow(body: dict[str, Any], _: int) -> Response:
        async with slots:
            await asyncio.sleep(0.03)
        return await knows_all(body, 1)

    def kept() -> set[str]:
        with sessions() as session:
            return {answer.request["messages"][0]["content"][-1]["text"] for answer in session.scalars(select(Answer))}

    def start() -> Any:
        child = children.Process(target=run_to_be_killed, args=(server.url, data, tmp_path / "killed", url))
        child.start()
        return child

    with serving(slow) as server:
        sizes = []
        for _ in range(20):
            before, asked = kept(), dict(server.asked)
            child = start()
            seen = sum(server.asked.values())
            deadline = time.monotonic() + 20
            while sum(server.asked.values()) == seen and child.is_alive() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(draw.uniform(0.0, 0.25))
            child.kill()
            child.join()
            assert child.exitcode == -9  # it had not ended by itself
            assert all(server.asked[text] == asked[text] for text in before)
            assert before <= kept()
            sizes.append(len(kept()))
        assert sizes[-1] < 600 and len(set(sizes)) > 5
        before, asked = kept(), dict(server.asked)
        child = start()
        child.join(60)
        assert child.exitcode == 0
        assert all(server.asked[text] == asked[text] for text in before)
        run_to_be_killed(server.url, data, tmp_path / "whole", f"sqlite:///{tmp_path}/whole.db")
    killed, whole = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("killed", "whole"))
    assert killed["answered"] == 600 and killed["scores"]["exact"]["accuracy"] == 100
    assert killed["hash"] == whole["hash"]


def test_bad_images_and_failures_are_named_and_a_misleading_score_is_refused(tmp_path: Path) -> None:
    data = write_vqa(tmp_path, 200)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    rows = json.loads(data.read_text())
    rows[3]["image"] = "broken.png"
    data.write_text(json.dumps(rows))
    ill = {"q5"}

    async def behave(body: dict[str, Any], _: int) -> Response:
        return Response("no", 400) if text_of(body) in ill else await knows_all(body, 1)

    task = Task("vqa", data, tmp_path / "pictures")
    with serving(behave) as server:
        result = run(server, tmp_path, task)
        assert result.scores["status"] == "scored"
        assert result.scores["scores"]["exact"]["accuracy"] == 99.0  # what was not answered is wrong
        assert result.scores["missing"] == ["3", "5"]
        assert result.scores["failures"] == {"bad image": 1, "400": 1}
        assert [(one["id"], one["state"]) for one in lines(tmp_path / "run" / "failures.jsonl")] == [
            ("3", "bad image"),
            ("5", "failed"),
        ]
        ill |= {f"q{n}" for n in range(20, 26)}
        fresh = tmp_path / "fresh"
        fresh.mkdir()
        result = run(server, fresh, task)
        assert result.scores["status"] == "refused" and "the score would mislead" in result.scores["why"]
        assert "scores" not in result.scores and result.scores["answered"] == 192


def test_a_run_is_scored_again_without_asking(tmp_path: Path) -> None:
    data = write_vqa(tmp_path, 20)
    with serving(knows_all) as server:
        first = run(server, tmp_path, Task("vqa", data, tmp_path / "pictures"))
    assert rescore(tmp_path / "run").scores == first.scores
    answers = lines(tmp_path / "run" / "answers.jsonl")
    answers[0]["prediction"] = "something else"
    (tmp_path / "run" / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    changed = rescore(tmp_path / "run")
    assert changed.scores["scores"]["exact"]["accuracy"] == 95.0
    assert changed.scores["hash"] != first.scores["hash"]
    data.write_text(data.read_text().replace("q1", "Q1"))
    with pytest.raises(DataError, match="is not the data that was asked"):
        rescore(tmp_path / "run")
    with pytest.raises(DataError, match="not the directory of a run"):
        rescore(tmp_path)


def test_a_stopped_run_says_so_and_goes_on(tmp_path: Path) -> None:
    data = write_vqa(tmp_path, 60)

    async def slow(body: dict[str, Any], _: int) -> Response:
        await asyncio.sleep(0.05)
        return await knows_all(body, 1)

    with serving(slow) as server:
        task = Task("vqa", data, tmp_path / "pictures")
        until = time.monotonic() + 0.6
        stopped = run(server, tmp_path, task, stop=lambda: time.monotonic() > until)
        assert stopped.stopped == "stopped" and 0 < stopped.scores["answered"] < 60
        assert stopped.scores["status"] == "refused"
        whole = run(server, tmp_path, task)
        assert whole.scores["status"] == "scored" and whole.progress.kept >= stopped.scores["answered"]


def test_data_may_be_in_the_object_store(tmp_path: Path) -> None:
    async def work() -> Path:
        store = DirectoryStore(tmp_path / "objects")
        await store.put("benchmarks/own/questions.json", b"[]")
        with pytest.raises(DataError, match="no such object"):
            await fetch("benchmarks/own/other.json", store, tmp_path / "here")
        with pytest.raises(DataError, match="no key"):
            await fetch("../secret", store, tmp_path / "here")
        return await fetch("benchmarks/own/questions.json", store, tmp_path / "here")

    path = asyncio.run(work())
    assert path.name == "questions.json" and path.read_bytes() == b"[]"
