"""What cannot work is said at the start, in one line, and ends the service with exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOBODY = "127.0.0.1:1"  # nothing listens there
S3 = {
    "BASALT_STORE": "s3://basalt",
    "BASALT_S3_ENDPOINT": f"http://{NOBODY}",
    "BASALT_S3_ACCESS_KEY": "a",
    "BASALT_S3_SECRET_KEY": "b",
}
GATEWAY, VISION, TRAINER = (["-m", f"services.{name}"] for name in ("gateway", "vision", "trainer"))
WORKER = ["-m", "celery", "--quiet", "-A", "services.trainer.worker", "worker"]


def started(command: list[str], tmp_path: Path, **settings: str) -> tuple[int, list[str]]:
    """Exit code and lines of stderr of a service that should end by itself."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("BASALT_")}
    place = {"BASALT_STORE": str(tmp_path / "store"), "BASALT_DATABASE": f"sqlite:///{tmp_path}/basalt.db"}
    done = subprocess.run(
        [sys.executable, *command], env=own | place | settings, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, [line for line in done.stderr.splitlines() if line]


@pytest.mark.parametrize("service", [GATEWAY, TRAINER, WORKER], ids=["gateway", "trainer", "worker"])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (S3, f"BASALT_S3_ENDPOINT=http://{NOBODY} cannot be used"),
        (S3 | {"BASALT_S3_SECRET_KEY": ""}, "BASALT_S3_SECRET_KEY is not set"),
        ({"BASALT_STORE": "/dev/full/objects"}, "BASALT_STORE=/dev/full/objects cannot be used"),
    ],
    ids=["endpoint", "secret", "unwritable"],
)
def test_an_object_store_that_cannot_be_used(
    service: list[str], settings: dict[str, str], told: str, tmp_path: Path
) -> None:
    code, lines = started(service, tmp_path, **settings)
    assert code == 2 and len(lines) == 1 and told in lines[0], lines


@pytest.mark.parametrize("service", [TRAINER, WORKER], ids=["trainer", "worker"])
def test_a_database_that_does_not_answer(service: list[str], tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL")
    url = f"postgresql+psycopg://basalt:hidden@{NOBODY}/basalt"
    code, lines = started(service, tmp_path, BASALT_DATABASE=url)
    assert code == 2 and len(lines) == 1 and "BASALT_DATABASE postgresql+psycopg://basalt:***@" in lines[0], lines
    assert "hidden" not in lines[0]


def test_no_gpu_where_one_is_asked_for(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the vision service needs it")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, lines = started(VISION, tmp_path, BASALT_VISION_DEVICE="cuda", BASALT_VISION_PORT="0")
    assert code == 2 and lines == ["basalt vision: BASALT_VISION_DEVICE=cuda: torch sees 0 GPUs here"], lines
    code, lines = started(WORKER, tmp_path, BASALT_TRAINER_REQUIRE_GPU="1")
    told = "basalt worker: BASALT_TRAINER_REQUIRE_GPU is set, and torch sees no GPU here"
    assert code == 2 and lines == [told], lines


@pytest.mark.parametrize("service", ["vision", "llm"])
def test_a_manifest_of_another_version(service: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the services that read manifests need it")
    shutil.copytree(ROOT / "models/basalt-tiny", tmp_path / "models/basalt-tiny")
    path = tmp_path / "models/basalt-tiny/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["tower"]["fit"]
    path.write_text(json.dumps(manifest))
    base = tmp_path / "base"
    base.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "max_position_embeddings": 8192}
    (base / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "model.safetensors"):
        (base / name).touch()
    code, lines = started(
        ["-m", f"services.{service}"],
        tmp_path,
        BASALT_MODELS_DIR=str(tmp_path / "models"),
        BASALT_BASE_LM_DIR=str(base),
    )
    assert code == 2 and len(lines) == 1, lines
    assert "another version of Basalt, or damaged: tower.fit: Field required" in lines[0]
