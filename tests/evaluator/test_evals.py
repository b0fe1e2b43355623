"""Evals and runs as their users submit and watch them, and what becomes of them when things die."""

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest
from fastapi import Response

from tests.collector import Collector
from tests.eval.openai_shaped import Server, completion, text_of
from tests.eval.test_run import write_vqa
from tests.evaluator.conftest import Evaluator
from tests.trainer.conftest import wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


async def right(body: dict[str, Any], _: int) -> Response:
    return completion(text_of(body).replace(" q", " a"))


async def right_but_slow(body: dict[str, Any], time_asked: int) -> Response:
    await asyncio.sleep(0.2)
    return await right(body, time_asked)


def make_data(evaluator: Evaluator, name: str, count: int) -> dict[str, Any]:
    """An eval's request; its questions are its own."""
    folder = evaluator.directory / "data" / name
    path = write_vqa(folder, count)
    rows = json.loads(path.read_text())
    for row in rows:
        row |= {"question": f"{name} {row['question']}", "answer": f"{name} {row['answer']}"}
    path.write_text(json.dumps(rows))
    source = {"type": "benchmark", "benchmark": "vqa", "data": f"{name}/questions.json", "images": f"{name}/pictures"}
    return {"name": name, "data_source_config": source, "testing_criteria": []}


def until(evaluator: Evaluator, eval_id: str, run_id: str, *statuses: str, seconds: float = 60) -> Any:
    client = evaluator.client()
    deadline = time.monotonic() + seconds
    while (run := client.evals.runs.retrieve(run_id, eval_id=eval_id)).status not in statuses:
        assert time.monotonic() < deadline, (run, evaluator.log())
        time.sleep(0.1)
    return run


def test_one_call_makes_a_report(evaluator: Evaluator, assistant: Server) -> None:
    assistant.behave = right
    request = make_data(evaluator, "one", 30)
    request["run"] = {"data_source": {"type": "completions", "model": "m", "price": {"prompt": 1, "completion": 2}}}
    made = httpx.post(f"{evaluator.url}/v1/evals", json=request).raise_for_status().json()
    eval_id, run_id = made["id"], made["run"]["id"]
    runs = f"{evaluator.url}/v1/evals/{eval_id}/runs/{run_id}"
    with httpx.stream("GET", f"{runs}/events?stream=true", timeout=60) as live:
        told = [json.loads(line[6:]) for line in live.iter_lines() if line.startswith("data: {")]
    run = until(evaluator, eval_id, run_id, "completed")
    assert run.result_counts.model_dump() == {"total": 30, "errored": 0, "failed": 0, "passed": 30}
    assert run.per_model_usage[0].prompt_tokens == 300
    assert run.progress["asking"]["cost"] == pytest.approx((300 + 60 * 2) / 1e6)
    assert run.scores["scores"]["exact"]["accuracy"] == 100
    messages = [event["message"] for event in told]
    assert messages[0] == "Created" and messages[-1] == "Done: scored" and "asking: 30 of 30" in messages
    files = [one["id"] for one in httpx.get(f"{evaluator.url}{run.report_url}").json()["data"]]
    assert {"scores.json", "manifest.json", "answers.jsonl", "verdicts.jsonl", "report.md"} <= set(files)
    assert "| soft | 30 | 100.0 [" in httpx.get(f"{runs}/files/report.md").text
    assert httpx.get(f"{runs}/files/scores.json").json()["hash"] == run.scores["hash"]
    assert len(httpx.get(f"{runs}/files/answers.jsonl").text.splitlines()) == 30
    assert httpx.get(f"{runs}/files/passwd").status_code == 404


def test_the_openai_client_works_and_what_was_asked_is_not_asked_again(evaluator: Evaluator, assistant: Server) -> None:
    assistant.behave = right
    client = evaluator.client()
    made = client.evals.create(**make_data(evaluator, "client", 20))
    assert client.evals.retrieve(made.id).name == "client"
    source = {"type": "completions", "model": "m"}
    first = client.evals.runs.create(made.id, data_source=source, name="first", metadata={"why": "test"})  # type: ignore[arg-type]
    until(evaluator, made.id, first.id, "completed")
    asked = sum(assistant.asked.values())
    second = client.evals.runs.create(made.id, data_source=source)  # type: ignore[arg-type]
    until(evaluator, made.id, second.id, "completed")
    blind = client.evals.runs.create(made.id, data_source=source | {"blind": True, "limit": 5})  # type: ignore[arg-type]
    assert until(evaluator, made.id, blind.id, "completed").result_counts.total == 5
    assert sum(assistant.asked.values()) == asked + 5
    assert [run.id for run in client.evals.runs.list(made.id)] == [first.id, second.id, blind.id]
    assert made.id in [one.id for one in client.evals.list()]


def test_a_run_is_cancelled(evaluator: Evaluator, assistant: Server) -> None:
    assistant.behave = right_but_slow
    client = evaluator.client()
    made = client.evals.create(**make_data(evaluator, "cancelled", 3000))
    run = client.evals.runs.create(made.id, data_source={"type": "completions", "model": "m"})  # type: ignore[arg-type]
    until(evaluator, made.id, run.id, "in_progress")
    client.evals.runs.cancel(run.id, eval_id=made.id)
    until(evaluator, made.id, run.id, "canceled", seconds=20)
    asked = sum(assistant.asked.values())
    time.sleep(1)
    assert sum(assistant.asked.values()) == asked
    with pytest.raises(openai.ConflictError, match="has cancelled"):
        client.evals.runs.cancel(run.id, eval_id=made.id)


def test_a_worker_s_death_costs_no_answer(evaluator: Evaluator, assistant: Server) -> None:
    assistant.behave = right_but_slow
    client = evaluator.client()
    made = client.evals.create(**make_data(evaluator, "death", 400))
    run = client.evals.runs.create(made.id, data_source={"type": "completions", "model": "m"})  # type: ignore[arg-type]

    def asked() -> list[int]:
        return [count for text, count in assistant.asked.items() if text.startswith("death")]

    while len(asked()) < 60:
        time.sleep(0.05)
    evaluator.kill("worker")
    evaluator.kill("redis")  # and everything that was in it is gone
    evaluator.start("redis")
    evaluator.start("worker")
    done = until(evaluator, made.id, run.id, "completed", seconds=90)
    assert done.result_counts.passed == 400
    assert len(asked()) == 400
    assert sum(asked()) - 400 <= 64  # at most those under way at its death


def test_what_cannot_be_is_refused_at_once(evaluator: Evaluator) -> None:
    client = evaluator.client()
    request = make_data(evaluator, "refused", 2)
    source = request["data_source_config"]
    for change, told in (
        ({"benchmark": "mmlu"}, "there is no benchmark 'mmlu'"),
        ({"data": "no-such.json"}, "there is no 'no-such.json'"),
        ({"data": "../basalt.db"}, "there is no '../basalt.db'"),
        ({"data": "files/sha256/x"}, "begins with 'benchmarks/'"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            client.evals.create(**(request | {"data_source_config": source | change}))
    with pytest.raises(openai.BadRequestError, match="scored by rules"):
        client.evals.create(**(request | {"testing_criteria": [{"type": "judge", "model": "m"}]}))
    made = client.evals.create(**request)
    for change, told in (({"endpoint": "http://10.0.0.1"}, "there are gateway, nowhere"), ({"limit": 0}, "limit")):
        with pytest.raises(openai.BadRequestError, match=told):
            client.evals.runs.create(made.id, data_source={"type": "completions", "model": "m"} | change)  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError):
        client.evals.runs.retrieve("evalrun-none", eval_id=made.id)


def test_a_run_that_cannot_be_says_why(evaluator: Evaluator) -> None:
    client = evaluator.client()
    request = make_data(evaluator, "bad", 2)
    (evaluator.directory / "data" / "bad" / "questions.json").write_text('[{"id": "1"}]')
    made = client.evals.create(**request)
    run = client.evals.runs.create(made.id, data_source={"type": "completions", "model": "m"})  # type: ignore[arg-type]
    failed = until(evaluator, made.id, run.id, "failed")
    assert failed.error.code == "invalid_data" and "has no 'image', 'question'" in failed.error.message
    made = client.evals.create(**make_data(evaluator, "nobody", 2))
    nowhere = {"type": "completions", "model": "m", "endpoint": "nowhere"}
    run = client.evals.runs.create(made.id, data_source=nowhere)  # type: ignore[arg-type]
    failed = until(evaluator, made.id, run.id, "failed", seconds=60)
    assert failed.error.code == "not_answered" and "no server answers at http://127.0.0.1:9/v1" in failed.error.message
    events = httpx.get(f"{evaluator.url}/v1/evals/{made.id}/runs/{run.id}/events").json()["data"]
    assert sum("it is tried again" in event["message"] for event in events) == 2


def test_a_run_goes_on_with_its_submitters_trace_on_every_worker(
    evaluator: Evaluator, assistant: Server, collector: Collector
) -> None:
    """The API's span, each worker's attempt below it, and what the workers ask the gateway below that."""
    assistant.behave = right_but_slow
    trace = "e" * 32
    request = make_data(evaluator, "traced", 300)
    request["run"] = {"data_source": {"type": "completions", "model": "m"}}
    headers = {"traceparent": f"00-{trace}-{'c' * 16}-01", "x-request-id": "mine"}
    answer = httpx.post(f"{evaluator.url}/v1/evals", json=request, headers=headers).raise_for_status()
    assert answer.headers["x-request-id"] == "mine"
    eval_id, run_id = answer.json()["id"], answer.json()["run"]["id"]
    wait(lambda: len(asked_of(assistant, trace)) > 10, 60)
    told = httpx.get(f"{evaluator.url}/metrics").text
    assert 'basalt_jobs{kind="evaluation",status="running"} 1.0' in told
    evaluator.kill("worker")
    evaluator.start("worker")
    until(evaluator, eval_id, run_id, "completed", seconds=120)
    collector.wait_for(lambda: any(span.name == "evaluation" for span in collector.of_trace(trace)))
    spans = collector.of_trace(trace)
    api = next(span for span in spans if span.name == "POST /v1/evals")
    assert (api.service, api.parent, api.attributes["request_id"]) == ("basalt-evaluator", "c" * 16, "mine")
    attempt = next(span for span in spans if span.name == "evaluation")  # a worker that was killed has told nothing
    assert (attempt.service, attempt.parent) == ("basalt-eval-worker", api.id)
    assert attempt.attributes["job"] == run_id and attempt.attributes["status"] == "succeeded"
    phases = {span.name: span for span in spans if span.parent == attempt.id}
    assert list(phases) == ["evaluate", "publish"]
    parents = {header.split("-")[2] for header in asked_of(assistant, trace)}
    assert len(parents) == 2 and phases["evaluate"].id in parents  # of both attempts
    assert not any(b"traced q" in message or b"secret" in message for message in collector.raw)


def asked_of(assistant: Server, trace: str) -> list[str]:
    """The traceparent of every question of a trace."""
    sent = [headers.get("traceparent", "") for headers in assistant.headers]
    return [header for header in sent if header.split("-")[1:2] == [trace]]
