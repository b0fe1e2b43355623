"""What is drawn and alerted on is what the services tell."""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import ROOT

FOLDER = ROOT / "deploy/observability"
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = json.loads((FOLDER / "dashboards/basalt.json").read_text())["panels"]
EXPRESSIONS = [alert["expr"] for alert in ALERTS] + [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_vllm_tells_what_is_asked() -> None:
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    package = Path(spec.submodule_search_locations[0])
    source = "".join(path.read_text() for path in (package / "v1/metrics").glob("*.py"))
    asked = {name for text in EXPRESSIONS for name in re.findall(r"vllm:[a-z_]+", text)}
    assert len(asked) > 8
    for name in asked:
        assert f'"{re.sub("(_total|_bucket)$", "", name)}"' in source, name


def test_every_alert_says_what_to_do() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for alert in ALERTS:
        assert f"`{alert['alert']}`" in page, alert["alert"]


def test_prometheus_reads_it(compose: dict[str, Any]) -> None:
    scraped = {
        job["dns_sd_configs"][0]["names"][0]
        for job in yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    }
    assert scraped <= set(compose["services"])
    if shutil.which("promtool") is None:
        pytest.skip("promtool, which checks the files, is not installed")
    subprocess.run(["promtool", "check", "config", str(FOLDER / "prometheus.yml")], check=True)
