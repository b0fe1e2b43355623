"""One call that makes a report: questions of one's own, asked of the assistant through every service."""

import io
import json
import tarfile
import time

import httpx
import openai
import pytest

from .conftest import Stack
from .test_stack import MODEL, data_url, shape, sign

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_uploaded_questions_are_asked_and_scored(stack: Stack) -> None:
    rows = [
        {"id": "sign", "image": "sign.png", "question": "What word is on the sign?", "answers": ["stop"]},
        {"id": "shape", "image": "shape.png", "question": "What colour is the shape?", "answers": ["red"]},
    ]
    files = openai.OpenAI(base_url=f"{stack.trainer}/v1", api_key="none").files
    data = files.create(file=("questions.json", json.dumps(rows).encode()), purpose="evals")
    pictures = {"sign.png": sign(), "shape.png": shape("red")}
    images = files.create(file=("images.tar", tar(pictures)), purpose="evals")
    source = {"type": "benchmark", "benchmark": "vqa", "data": data.id, "images": images.id}
    request = {"data_source_config": source, "run": {"data_source": {"type": "completions", "model": MODEL}}}
    made = httpx.post(f"{stack.evaluator}/v1/evals", json=request).raise_for_status().json()
    url = f"{stack.evaluator}/v1/evals/{made['id']}/runs/{made['run']['id']}"
    deadline = time.monotonic() + 120
    while (run := httpx.get(url).json())["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline, run
        time.sleep(0.5)
    assert run["status"] == "completed", run["error"]
    assert run["result_counts"]["total"] == 2 and run["result_counts"]["errored"] == 0
    answers = [json.loads(line) for line in httpx.get(f"{url}/files/answers.jsonl").text.splitlines()]
    for one, row in zip(answers, rows, strict=True):  # what the evaluator kept is what the gateway says to anybody
        shown = {"type": "image_url", "image_url": {"url": data_url(pictures[row["image"]])}}
        content = [shown, {"type": "text", "text": row["question"]}]
        said = stack.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item]
            temperature=0,
            max_tokens=128,
        )
        assert one["prediction"] == said.choices[0].message.content
    manifest = httpx.get(f"{url}/files/manifest.json").json()
    assert manifest["model"]["version"].startswith("sha256:") and manifest["model"]["fingerprint"]
