"""The committed stubs are what `proto/` generates."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROTO = "basalt/rpc/vision/v1/vision.proto"
VERSIONS = re.compile(r"\d+\.\d+\.\d+|^ +\d+,$", re.MULTILINE)  # of the generator, which are not the contract's


def test_stubs_are_generated_from_the_proto(tmp_path: Path):
    pytest.importorskip("grpc_tools", reason="the generator")
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs, PROTO], cwd=ROOT, check=True)
    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    assert len(generated) == 3
    for path in generated:
        fresh, committed = ((root / path).read_text() for root in (tmp_path, ROOT))
        assert VERSIONS.sub("", fresh) == VERSIONS.sub("", committed), f"{path}: see basalt/rpc/__init__.py"
