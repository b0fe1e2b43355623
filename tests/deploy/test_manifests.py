"""The Kubernetes manifests: valid, safe by policy, and of one mind with the Compose file and the services' settings."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from basalt.train.recipe import load_recipe
from tests.deploy.conftest import K8S, OVERLAYS, READS, ROOT, Manifest, kustomized, manifests, settings_fields

WORKLOADS = ("Deployment", "StatefulSet", "Job")
OPENTELEMETRYS = {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"}
MADE_OF = {"DATABASE_PASSWORD", "REDIS_PASSWORD"}  # what other variables are made of


def named(documents: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def pods(documents: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Workload → its pod's template."""
    for document in documents:
        if document["kind"] in WORKLOADS:
            yield document["metadata"]["name"], document["spec"]["template"]


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


@pytest.mark.parametrize("folder", [K8S, *sorted(OVERLAYS.iterdir())], ids=lambda folder: folder.name)
def test_valid_for_the_newest_three_versions(folder: Path) -> None:
    versions = sorted(
        kubernetes_validate.utils.all_versions(), key=lambda text: [int(part) for part in text.split(".")]
    )[-3:]
    documents = kustomized(folder)
    assert len(documents) > 30
    for document in documents:
        if document["apiVersion"].startswith("keda.sh/"):  # no part of Kubernetes
            continue
        for version in versions:
            kubernetes_validate.validate(document, version, strict=True)


def test_plain_apply_reads_the_same_as_kustomize(cluster: list[Manifest]) -> None:
    key = lambda each: (each["kind"], each["metadata"]["name"])  # noqa: E731
    assert sorted(map(key, cluster)) == sorted(map(key, kustomized(K8S)))


def test_policies_hold() -> None:
    if shutil.which("checkov") is None:  # it pins older versions of what we use: an environment of its own
        pytest.skip("checkov, which knows the policies, is not installed")
    command = ["checkov", "--config-file", "deploy/checkov.yaml", "-d", "deploy/k8s"]
    done = subprocess.run([*command, "-o", "json"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    report = json.loads(done.stdout)
    failed = {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}
    assert not failed and report["summary"]["passed"] > 800


def test_every_pod_is_restricted(cluster: list[Manifest]) -> None:
    namespace = named(cluster, "Namespace")["basalt"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in pods(cluster):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is (name == "secrets"), name
        for container in containers(pod):
            expected = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["securityContext"] == expected, (name, container["name"])
            assert {"requests", "limits"} <= set(container["resources"]), (name, container["name"])


def test_services_reach_their_pods(cluster: list[Manifest]) -> None:
    labelled = [(pod["metadata"]["labels"], pod) for _, pod in pods(cluster)]
    for name, service in named(cluster, "Service").items():
        selector = service["spec"]["selector"].items()
        chosen = [pod for labels, pod in labelled if selector <= labels.items()]
        assert len(chosen) == 1, name
        ports = {port["name"]: port["containerPort"] for port in chosen[0]["spec"]["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"], name


def test_policies_let_each_client_through_on_both_ends(cluster: list[Manifest]) -> None:
    """What one pod may send, the other may receive, and nothing else; only the gateway reaches the internet."""
    policies = named(cluster, "NetworkPolicy")
    sends: set[tuple[str, str, int]] = set()
    receives: set[tuple[str, str, int]] = set()
    for name, policy in policies.items():
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                if "ipBlock" in peer:
                    assert name == "gateway"
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"] or ":" in peer["ipBlock"]["cidr"]
                elif "namespaceSelector" not in peer:
                    sends |= {
                        (name, peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"], port["port"])
                        for port in rule["ports"]
                    }
        for rule in policy["spec"].get("ingress", []):
            for peer in rule.get("from", []):
                if "namespaceSelector" in peer:
                    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
                    continue
                receives |= {
                    (peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"], name, port["port"])
                    for port in rule["ports"]
                }
    open_to_all = {"gateway", "ui", "trainer", "evaluator"}
    assert {link for link in sends if link[1] not in open_to_all} == receives
    assert policies["nothing"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def variables(container: Manifest, cluster: list[Manifest]) -> dict[str, str | None]:
    """A container's environment; None for what comes from a Secret."""
    config = named(cluster, "ConfigMap")
    shared = {
        key: value
        for ref in container.get("envFrom", [])
        for key, value in config[ref["configMapRef"]["name"]]["data"].items()
    }
    return shared | {each["name"]: each.get("value") for each in container.get("env", [])}


@pytest.mark.parametrize("workload", READS)
def test_settings_are_the_services(workload: str, cluster: list[Manifest], compose: dict[str, Any]) -> None:
    """Every variable that a manifest sets is one that its service reads, and all that it must be told are set."""
    fields = settings_fields(READS[workload])
    pod = dict(pods(cluster))[workload]
    in_cluster = variables(pod["spec"]["containers"][0], cluster)
    in_compose = compose["services"][workload].get("environment", {})
    shared = set(named(cluster, "ConfigMap")["basalt"]["data"])
    assert set(in_cluster) - shared - MADE_OF <= set(fields)
    assert set(in_compose) - OPENTELEMETRYS <= set(fields)
    assert set(in_compose) >= OPENTELEMETRYS or workload == "ui"
    # Where the others are: what a service reads of these, both tell it, and tell it the same.
    places = {"BASALT_STORE", "BASALT_S3_ENDPOINT", "BASALT_S3_ACCESS_KEY", "BASALT_S3_SECRET_KEY", "BASALT_DATABASE"}
    places |= {"BASALT_REDIS_URL", "BASALT_VISION_ADDRESS", "BASALT_LLM_URL", "BASALT_GATEWAY_URL"}
    wanted = places & set(fields)
    assert wanted <= set(in_cluster) and wanted <= set(in_compose)
    for name in sorted(wanted):
        told = in_cluster[name]
        if told is not None and "$(" not in told:
            assert told == in_compose[name], name
    if "BASALT_DATABASE" in wanted:
        strip = lambda url: re.sub(r":[^:@/]*@|:\$\(.*?\)@|:\$\{.*\}[^@]*@", ":…@", str(url))  # noqa: E731
        assert strip(in_cluster["BASALT_DATABASE"]) == strip(in_compose["BASALT_DATABASE"])


@pytest.mark.parametrize("workload", READS)
def test_images_ports_and_commands_agree(workload: str, cluster: list[Manifest], compose: dict[str, Any]) -> None:
    service = compose["services"][workload]
    pod = dict(pods(cluster))[workload]
    container = next(each for each in pod["spec"]["containers"])
    assert service["image"] == "${BASALT_REGISTRY:-}" + container["image"].replace(":", ":${BASALT_TAG:-") + "}"
    assert service.get("command") == container.get("command")
    dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
    exposed = {
        int(port) for line in re.findall(r"^EXPOSE ([\d ]+)$", dockerfile, re.MULTILINE) for port in line.split()
    }
    ports = {port["containerPort"] for port in container.get("ports", []) if port["name"] != "metrics"}
    assert {port["containerPort"] for port in container.get("ports", [])} <= exposed
    if (ROOT / "services" / READS[workload] / "settings.py").is_file() and ports:
        fields = settings_fields(READS[workload])
        assert ports == {fields[f"BASALT_{READS[workload].upper()}_PORT"].default}
    published = [str(port).rsplit(":", 1)[-1] for port in service.get("ports", [])]
    assert published == ([str(port) for port in ports] if workload in ("gateway", "ui") else [])
    grace = int(service.get("stop_grace_period", "10s").removesuffix("s"))
    assert pod["spec"]["terminationGracePeriodSeconds"] >= grace


def test_a_worker_may_finish_its_step(cluster: list[Manifest]) -> None:
    stop = settings_fields("trainer")["BASALT_TRAINER_STOP_SECONDS"].default
    assert dict(pods(cluster))["worker"]["spec"]["terminationGracePeriodSeconds"] > stop + 30


def test_secrets_are_by_reference(cluster: list[Manifest]) -> None:
    from basalt.cluster_secrets import NAMES

    assert not named(cluster, "Secret")
    used = {
        each["valueFrom"]["secretKeyRef"]["key"]
        for _, pod in pods(cluster)
        for container in containers(pod)
        for each in container.get("env", [])
        if "valueFrom" in each
    }
    assert used == set(NAMES)


def test_the_overlays(cluster: list[Manifest]) -> None:
    gpu = kustomized(OVERLAYS / "gpu")
    for name in ("vision", "llm", "worker"):
        pod = dict(pods(gpu))[name]["spec"]
        container = pod["containers"][0]
        assert container["image"].endswith("-cuda") and container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert pod["tolerations"] and pod["nodeSelector"]
        package = READS[name]
        assert set(variables(container, gpu)) - set(variables(container | {"env": []}, gpu)) - MADE_OF <= set(
            settings_fields(package)
        )
    assert {each["spec"]["replicas"] for each in named(kustomized(OVERLAYS / "cpu"), "Deployment").values()} == {1}
    keda = kustomized(OVERLAYS / "keda")
    assert set(named(keda, "ScaledObject")) == {"worker", "eval-worker", "llm", "vision"}
    scaled = set(named(keda, "HorizontalPodAutoscaler"))
    assert not scaled & set(named(keda, "ScaledObject"))  # two that scale one would fight


def test_hub_ids_are_folders_of_the_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pod of the GPU overlay reaches the hub: a hub id is looked up from the working directory, nothing else is."""
    monkeypatch.setenv("BASALT_DATA", "/data")
    recipes = [load_recipe(path) for path in ROOT.glob("recipes/*-siglip/stage?.yaml")]
    ids = {str(recipe.base_lm) for recipe in recipes} | {recipe.tower.id for recipe in recipes}
    assert len(ids) == 3 and not any(Path(each).is_absolute() for each in ids)
    gpu = kustomized(OVERLAYS / "gpu")
    for name in ("vision", "trainer", "worker"):
        container = dict(pods(gpu))[name]["spec"]["containers"][0]
        assert container["workingDir"] == "/models"
        assert {"name": "models", "mountPath": "/models", "readOnly": True} in container["volumeMounts"]
        told = variables(container, gpu)
        fields = settings_fields(READS[name])
        places = [variable for variable, field in fields.items() if isinstance(field.default, Path)]
        if name == "trainer":  # the others are its worker's
            places = ["BASALT_TRAINER_RECIPES", "BASALT_MODELS_DIR"]
        assert places and all(str(told[each]).startswith("/") for each in places)
    base_lm = variables(dict(pods(gpu))["llm"]["spec"]["containers"][0], gpu)["BASALT_BASE_LM_DIR"]
    assert str(base_lm).removeprefix("/models/") in ids


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_train_job_runs_what_there_is(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = manifests((OVERLAYS / "gpu/trainjob.yaml").read_text().replace("stage2", stage))  # as it says
    job, runtime = named(documents, "TrainJob")[stage], named(documents, "TrainingRuntime")["basalt"]
    command = job["spec"]["trainer"]["command"]
    assert command[:5] == ["torchrun", "-m", "basalt.cli", "train", stage]
    done = subprocess.run([sys.executable, "-m", *command[2:5], "--help"], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    node = pod["containers"][0]
    for each in node["env"]:
        monkeypatch.setenv(each["name"], each["value"])
    path, out = Path(command[5]), Path(command[7])
    recipe = load_recipe(ROOT / path.relative_to("/app"))
    assert recipe.passes_per_step % (job["spec"]["trainer"]["numNodes"] * job["spec"]["trainer"]["numProcPerNode"]) == 0
    # The root is read-only: what is written, and read, lies below the working directory, on a volume.
    assert {"name": "models", "mountPath": node["workingDir"]} in node["volumeMounts"]
    rows = [source.rows for source in recipe.data]
    for each in [recipe.base_lm, Path(recipe.tower.id), recipe.features, out, *rows]:
        assert (Path(node["workingDir"]) / each).is_relative_to(node["workingDir"])
    assert recipe.start in (None, Path(str(out).replace("stage2", "stage1")))


@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_passwords_are_made_once(there: bool, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Cluster(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append({"path": self.path, "token": self.headers["Authorization"], "body": json.loads(body)})
            self.send_response(409 if there else 201)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tmp_path / "namespace").write_text("basalt")
    (tmp_path / "token").write_text("t")
    with HTTPServer(("127.0.0.1", 0), Cluster) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {
            "BASALT_SERVICE_ACCOUNT": str(tmp_path),
            "BASALT_CLUSTER_API": f"http://127.0.0.1:{server.server_port}",
        }
        done = subprocess.run(
            [sys.executable, "-m", "basalt.cluster_secrets"],
            cwd=ROOT,
            env=place,
            capture_output=True,
            text=True,
            timeout=60,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("the Secret basalt is there" if there else "made the Secret basalt")
    assert asked[0]["path"] == "/api/v1/namespaces/basalt/secrets" and asked[0]["token"] == "Bearer t"
    assert len(set(asked[0]["body"]["data"].values())) == 5
