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
        assert f'"{re.sub("_(total|bucket|sum|count)$", "", name)}"' in source, name


def test_our_services_tell_what_is_asked() -> None:
    asked = {name for text in EXPRESSIONS for name in re.findall(r"basalt_[a-z_]+", text)}
    assert len(asked) > 12
    assert {re.sub("_(total|bucket|sum|count)$", "", name) for name in asked} <= metrics()


def test_every_metric_is_explained() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    assert len(metrics()) > 20
    for name in metrics():
        assert f"`{name}`" in page, name


def metrics() -> set[str]:
    """The names of all metrics of ours."""
    sources = [path.read_text() for folder in ("basalt", "services") for path in (ROOT / folder).rglob("*.py")]
    made = r"(?:Counter|Gauge|Histogram|GaugeMetricFamily|self\._one)\(\s*\"(basalt_[a-z_]+)\""
    return {name for source in sources for name in re.findall(made, source)}


JOBS = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{ series: 'basalt_jobs{{kind="training", status="queued", instance="a"}}', values: "2x30" }}
      - {{ series: 'basalt_jobs{{kind="training", status="running", instance="a"}}', values: "{running}x30" }}
      - {{ series: 'basalt_jobs_waited_seconds{{kind="training", instance="a"}}', values: "400+60x30" }}
      - {{ series: 'basalt_jobs_silent_seconds{{kind="training", instance="a"}}', values: "{silent}x30" }}
      - {{ series: 'basalt_jobs{{kind="training", status="failed", instance="a"}}', values: "3x10 {failed}x20" }}
    alert_rule_test:
      - {{ eval_time: 20m, alertname: {alert}, exp_alerts: {expected} }}
"""


@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize(
    ("alert", "wrong", "labels", "summary"),
    [
        ("BasaltJobsNotBegun", {"running": 0}, "page", "training jobs wait, and no worker works"),
        (
            "BasaltWorkerSilent",
            {"silent": 100},
            "page",
            "a worker in the middle of a training job is silent, and no other has taken the job",
        ),
        ("BasaltJobsFail", {"failed": 5}, "warn", "training jobs have failed within an hour"),
    ],
)
def test_alerts_on_jobs(
    alert: str, wrong: dict[str, int], labels: str, summary: str, fires: bool, tmp_path: Path
) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool, which evaluates the alerts, is not installed")
    values = {"running": 1, "silent": 5, "failed": 3} | (wrong if fires else {})
    expected = [{"exp_labels": {"severity": labels, "kind": "training"}, "exp_annotations": {"summary": summary}}]
    test = tmp_path / "test.yml"
    told = json.dumps(expected if fires else [])
    test.write_text(JOBS.format(rules=FOLDER / "alerts.yml", alert=alert, expected=told, **values))
    done = subprocess.run(["promtool", "test", "rules", str(test)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
