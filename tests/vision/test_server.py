"""The vision service's contract, over real gRPC, on a tiny SigLIP tower."""

import asyncio
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import prometheus_client
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from safetensors.torch import load_file

from basalt.assistants import load_assistants, sha256
from basalt.catalog import reference
from basalt.data.images import decode_image
from basalt.handoff import handoff_path
from basalt.model.projector import load_projector
from basalt.model.vision_encoder import load_vision_encoder
from basalt.object_store import image_key
from basalt.registry import publish
from basalt.rpc.vision.v1 import vision_pb2
from tests.tiny import LM_DIM, TOKENS, make_assistant, picture
from tests.vision.conftest import Start, Vision

SERVICE = "basalt.rpc.vision.v1.Vision"


async def embed(vision: Vision, assistant: str, data: bytes, seconds: float = 30) -> vision_pb2.EmbedResponse:
    return await vision.stub.Embed(vision_pb2.EmbedRequest(assistant=assistant, image_bytes=data), timeout=seconds)


async def refusal(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def expected(models: Path, assistant: str, data: bytes) -> torch.Tensor:
    """The same by the library, with no service: [tokens, lm_dim], float32."""
    spec = load_assistants(models)[assistant]
    tower = load_vision_encoder(spec.manifest.tower)
    with torch.inference_mode():
        return load_projector(spec)(tower(tower.preprocess(decode_image(data))[None]))[0]


async def test_embeds_as_the_library_does(start: Start, models: Path):
    vision = await start()
    for assistant in ("one", "two"):
        answer = await embed(vision, assistant, picture(1))
        values = np.frombuffer(answer.data, "<f4").reshape(answer.shape)
        assert list(answer.shape) == [TOKENS, LM_DIM]
        assert answer.dtype == "float32"
        np.testing.assert_allclose(values, expected(models, assistant, picture(1)).numpy(), rtol=1e-4, atol=1e-5)


async def test_bfloat16_is_the_default_dtype_and_rounds_the_same_values(start: Start, models: Path):
    vision = await start(dtype="bfloat16")
    answer = await embed(vision, "one", picture(1))
    values = torch.frombuffer(bytearray(answer.data), dtype=torch.bfloat16).reshape(*answer.shape)
    assert answer.dtype == "bfloat16"
    torch.testing.assert_close(values.float(), expected(models, "one", picture(1)), rtol=2e-2, atol=2e-2)


async def test_digest_tells_image_assistant_and_dtype_apart(start: Start):
    vision, rounded = await start(), await start(dtype="bfloat16")
    answers = [await embed(vision, name, picture(n)) for name in ("one", "two") for n in (1, 2)]
    answers.append(await embed(rounded, "one", picture(1)))
    assert len({answer.digest for answer in answers}) == 5
    assert all(answer.digest.startswith("sha256:") for answer in answers)
    assert answers[0].image_id == sha256(picture(1))
    again = await embed(vision, "one", picture(1))
    assert (again.digest, again.data) == (answers[0].digest, answers[0].data)


async def test_tower_runs_once_for_all_assistants(start: Start):
    vision = await start()
    first = await embed(vision, "one", picture(1))
    second = await embed(vision, "two", picture(1))
    third = await embed(vision, "one", picture(1))
    assert [first.cached, second.cached, third.cached] == [
        vision_pb2.CACHED_NOTHING,
        vision_pb2.CACHED_FEATURES,
        vision_pb2.CACHED_EMBEDDINGS,
    ]
    assert vision.batches == [1]


async def test_requests_that_arrive_together_share_batches(start: Start, models: Path):
    vision = await start(max_batch_tokens=4 * TOKENS, batch_wait_ms=200)
    answers = await asyncio.gather(*(embed(vision, "one", picture(n)) for n in range(8)))
    assert sum(vision.batches) == 8
    assert max(vision.batches) == 4
    assert len(vision.batches) <= 4
    for n, answer in enumerate(answers):
        values = np.frombuffer(answer.data, "<f4").reshape(answer.shape)
        np.testing.assert_allclose(values, expected(models, "one", picture(n)).numpy(), rtol=1e-3, atol=1e-4)


async def test_the_same_image_at_the_same_time_is_computed_once(start: Start):
    vision = await start(batch_wait_ms=50)
    answers = await asyncio.gather(*(embed(vision, name, picture(1)) for name in ("one", "two") * 4))
    assert sum(vision.batches) == 1
    assert len({answer.data for answer in answers}) == 2


async def test_by_object_key(start: Start):
    vision = await start()
    data = picture(3)
    key = image_key(sha256(data))
    by_key = vision_pb2.EmbedRequest(assistant="one", object_key=key)
    code, details = await refusal(vision.stub.Embed(by_key))
    assert code == grpc.StatusCode.NOT_FOUND
    assert key in details
    await vision.store.put(key, data)
    answer = await vision.stub.Embed(by_key)
    assert answer.image_id == sha256(data)
    assert (await embed(vision, "one", data)).data == answer.data


async def test_by_reference_the_handoff_directory_holds_the_same_bytes(start: Start):
    vision = await start()
    request = vision_pb2.EmbedRequest(assistant="one", image_bytes=picture(1), by_reference=True)
    answer = await vision.stub.Embed(request)
    path = handoff_path(vision.settings.handoff_dir, answer.digest)
    assert path is not None
    assert answer.data == b""
    whole = await embed(vision, "one", picture(1))
    assert load_file(path)["embeddings"].numpy().tobytes() == whole.data


async def test_where_nothing_can_be_handed_off_the_bytes_go_along(start: Start):
    vision = await start(embedding_cache_bytes=0)
    request = vision_pb2.EmbedRequest(assistant="one", image_bytes=picture(1), by_reference=True)
    assert len((await vision.stub.Embed(request)).data) == TOKENS * LM_DIM * 4


async def test_embeddings_of_an_earlier_process_are_taken_over(start: Start, tmp_path: Path):
    first = await start(BASALT_HANDOFF_DIR=tmp_path / "kept")
    before = await embed(first, "one", picture(1))
    second = await start(BASALT_HANDOFF_DIR=tmp_path / "kept")
    after = await embed(second, "one", picture(1))
    assert (after.data, after.cached) == (before.data, vision_pb2.CACHED_EMBEDDINGS)
    assert second.batches == []


async def test_projectors_beyond_the_budget_are_loaded_again(start: Start):
    vision = await start(projector_bytes=20_000)  # one of them
    answers = [await embed(vision, name, picture(n)) for n in range(3) for name in ("one", "two")]
    assert len({answer.digest for answer in answers}) == 6


async def test_damaged_object_is_not_embedded(start: Start):
    vision = await start()
    key = image_key(sha256(picture(3)))
    await vision.store.put(key, picture(4))
    code, details = await refusal(vision.stub.Embed(vision_pb2.EmbedRequest(assistant="one", object_key=key)))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "damaged" in details


@pytest.mark.parametrize("key", ["", "../secret", "images/sha256/../../x", "checkpoints/a", "images/sha256/abc"])
async def test_only_image_keys_are_read(start: Start, key: str):
    vision = await start()
    code, _ = await refusal(vision.stub.Embed(vision_pb2.EmbedRequest(assistant="one", object_key=key)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a"),
        (picture(1)[:-200], "truncated"),
        (picture(1, size=(200, 200)), "pixels"),
        (picture(1, size=(90, 90), format="BMP"), "bytes"),
    ],
    ids=["empty", "svg", "truncated", "pixels", "bytes"],
)
async def test_what_is_no_image_is_refused_and_the_next_works(start: Start, data: bytes, said: str):
    vision = await start(max_pixels=100 * 100, max_image_bytes=20_000 if said == "bytes" else 1_000_000)
    code, details = await refusal(embed(vision, "one", data))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert said in details
    assert (await embed(vision, "one", picture(1))).shape == [TOKENS, LM_DIM]


async def test_a_request_without_an_image(start: Start):
    vision = await start()
    code, details = await refusal(vision.stub.Embed(vision_pb2.EmbedRequest(assistant="one")))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "image_bytes or object_key" in details


async def test_unknown_assistant_is_told_which_there_are(start: Start):
    vision = await start()
    code, details = await refusal(embed(vision, "three", picture(1)))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "one, two" in details


async def test_message_over_the_bound_is_refused(start: Start):
    vision = await start(max_image_bytes=100_000)
    code, _ = await refusal(embed(vision, "one", bytes(300_000)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await embed(vision, "one", picture(1))).data


async def test_full_queue_is_told(start: Start):
    vision = await start(queue_size=2, batch_wait_ms=300)
    waiting = [asyncio.create_task(embed(vision, "one", picture(n))) for n in range(2)]
    await asyncio.sleep(0.1)
    code, _ = await refusal(embed(vision, "one", picture(9)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert all(answer.data for answer in await asyncio.gather(*waiting))
    assert (await embed(vision, "one", picture(9))).data


async def test_past_its_deadline_a_request_is_not_computed(start: Start):
    vision = await start(batch_wait_ms=500)
    code, _ = await refusal(embed(vision, "one", picture(1), seconds=0.1))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.6)
    assert vision.batches == []
    assert (await embed(vision, "one", picture(1))).data


async def test_one_callers_deadline_does_not_take_the_image_from_another(start: Start):
    vision = await start(batch_wait_ms=400)
    patient = asyncio.create_task(embed(vision, "one", picture(1)))
    await asyncio.sleep(0.05)
    code, _ = await refusal(embed(vision, "two", picture(1), seconds=0.1))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await patient).data
    assert vision.batches == [1]


async def test_without_a_deadline_the_setting_holds(start: Start):
    vision = await start(max_seconds=0.1, batch_wait_ms=400)
    request = vision_pb2.EmbedRequest(assistant="one", image_bytes=picture(1))
    code, _ = await refusal(vision.stub.Embed(request))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_lists_its_assistants(start: Start, models: Path):
    vision = await start()
    answer = await vision.stub.ListAssistants(vision_pb2.ListAssistantsRequest())
    assert {a.name: (a.version, a.tokens, a.lm_dim) for a in answer.assistants} == {
        name: (assistant.version, TOKENS, LM_DIM) for name, assistant in load_assistants(models).items()
    }


async def test_health_and_reflection(start: Start):
    vision = await start()
    health = health_pb2_grpc.HealthStub(vision.channel)
    for service in ("", SERVICE):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflect = reflection_pb2_grpc.ServerReflectionStub(vision.channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    async for answer in reflect.ServerReflectionInfo(asked):
        assert SERVICE in {service.name for service in answer.list_services_response.service}


async def test_stop_finishes_what_runs_and_says_it_is_not_serving(start: Start):
    vision = await start(batch_wait_ms=400)
    running = asyncio.create_task(embed(vision, "one", picture(1)))
    watch = health_pb2_grpc.HealthStub(vision.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    stopping = asyncio.create_task(vision.server.stop())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    assert (await running).data
    await stopping


def run_service(models: Path, store: Path, port: int) -> subprocess.Popen[str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "BASALT_MODELS_DIR": str(models),
        "BASALT_STORE": str(store),
        "BASALT_VERSIONS_DIR": str(store / "versions"),
        "BASALT_HANDOFF_DIR": str(store / "handoff"),
        "BASALT_VISION_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "services.vision"], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.timeout(600)  # it imports torch twice
def test_the_process_starts_serves_and_drains_on_sigterm(models: Path, tmp_path: Path, free_port: int):
    process = run_service(models, tmp_path, free_port)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{free_port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=200)
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            second = run_service(models, tmp_path, free_port)
            _, said = second.communicate(timeout=200)
            assert second.returncode == 2
            assert "port" in said
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


def test_the_process_says_what_is_missing(tmp_path: Path, free_port: int):
    process = run_service(tmp_path / "none", tmp_path, free_port)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "BASALT_MODELS_DIR" in said
    assert "Traceback" not in said


async def test_metrics_tell_images_by_assistant_and_cache(start: Start):
    def count(cached: str) -> float:
        labels = {"assistant": "two", "cached": cached}
        return prometheus_client.REGISTRY.get_sample_value("basalt_vision_images_total", labels) or 0

    vision = await start()
    before = {cached: count(cached) for cached in ("nothing", "features", "embeddings")}
    await embed(vision, "one", picture(1))
    await embed(vision, "two", picture(1))
    await embed(vision, "two", picture(1))
    await embed(vision, "two", picture(2))
    assert {cached: count(cached) - seen for cached, seen in before.items()} == dict.fromkeys(before, 1)


async def test_versions_of_the_registry_are_brought_when_asked_for(start: Start, models: Path, tmp_path: Path):
    vision = await start()
    make_assistant(tmp_path / "elsewhere", "three", models.parent / "tower", seed=3)
    await publish(vision.store, tmp_path / "elsewhere/three")
    wanted = reference(load_assistants(tmp_path / "elsewhere")["three"])
    answer = await embed(vision, wanted, picture(1))
    values = np.frombuffer(answer.data, "<f4").reshape(answer.shape)
    right = expected(tmp_path / "elsewhere", "three", picture(1)).numpy()
    np.testing.assert_allclose(values, right, rtol=1e-4, atol=1e-5)
    code, _ = await refusal(embed(vision, f"three@{64 * 'a'}", picture(1)))
    assert code == grpc.StatusCode.NOT_FOUND


async def test_a_version_is_served_unchanged_after_its_directory_is_replaced(
    start: Start, tmp_path: Path, models: Path
):
    root = tmp_path / "served"
    make_assistant(root, "one", models.parent / "tower", seed=1)
    vision = await start(BASALT_MODELS_DIR=root, projector_bytes=0, embedding_cache_bytes=0)
    old = reference(vision.embedder.catalog.local["one"])
    before = await embed(vision, old, picture(1))
    shutil.rmtree(root / "one")
    make_assistant(root, "one", models.parent / "tower", seed=9)
    assert (await embed(vision, old, picture(1))).data == before.data
