"""What is read by several of these tests: the manifests, the Compose file, and the services' settings."""

import importlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S, OVERLAYS = ROOT / "deploy/k8s", ROOT / "deploy/overlays"
# Service of Compose and Kubernetes → the package whose settings it reads.
READS = {
    "gateway": "gateway",
    "vision": "vision",
    "llm": "llm",
    "ui": "ui",
    "trainer": "trainer",
    "worker": "trainer",
    "evaluator": "evaluator",
    "eval-worker": "evaluator",
}

Manifest = dict[str, Any]


def manifests(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def kustomized(folder: Path) -> list[Manifest]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders kustomizations, is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return manifests(done.stdout)


@pytest.fixture(scope="session")
def cluster() -> list[Manifest]:
    return [document for path in sorted(K8S.glob("*.yaml")) for document in manifests(path.read_text())]


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def settings_fields(package: str) -> dict[str, Any]:
    """Environment variable → field, of a service's settings."""
    settings = importlib.import_module(f"services.{package}.settings").Settings
    prefix = settings.model_config["env_prefix"]
    return {
        str(field.validation_alias or f"{prefix}{name}".upper()): field for name, field in settings.model_fields.items()
    }
