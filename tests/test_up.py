"""What `make up`, `make down` and the installer say when something is in the way. Real processes and ports."""

import ast
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from basalt import preflight
from basalt.preflight import ROOT


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("module", ["basalt.up", "basalt.down"])
def test_asked_for_help_nothing_is_started_or_stopped(module: str) -> None:
    assert "usage" in run("-m", module, "--help").stdout
    refused = run("-m", module, "--now")
    assert (refused.returncode, "unrecognized arguments: --now" in refused.stderr) == (2, True)


def test_a_taken_port_is_named_with_the_variable_that_changes_it(taken: int, tmp_path: Path) -> None:
    result = run("-m", "basalt.up", BASALT_VAR=str(tmp_path), BASALT_UI_PORT=str(taken))
    assert result.returncode == 1
    assert f"port {taken} (ui) is taken" in result.stderr and "BASALT_UI_PORT" in result.stderr


def test_one_port_for_two_services_is_refused(tmp_path: Path) -> None:
    result = run("-m", "basalt.up", BASALT_VAR=str(tmp_path), BASALT_UI_PORT="18000", BASALT_LLM_PORT="18000")
    assert result.returncode == 1 and "two services have the same port" in result.stderr


def test_what_is_not_a_port_is_refused(tmp_path: Path) -> None:
    result = run("-m", "basalt.up", BASALT_VAR=str(tmp_path), BASALT_LLM_PORT="eight")
    assert result.returncode == 1
    assert result.stderr.strip() == "BASALT_LLM_PORT=eight is not a port: give a number from 1 to 65535"


HOLD = "from basalt import preflight; mark = preflight.hold_running_mark(); print('held', flush=True); input()"


def test_a_second_start_says_who_runs_and_a_crash_leaves_nothing_behind(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=ROOT,
        env=os.environ | {"BASALT_VAR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    said = f"already running (process {holder.pid}). `make down` stops it"
    for command in (["-m", "basalt.up"], ["tools/install.py", "--start"]):
        result = run(*command, BASALT_VAR=str(tmp_path))
        assert result.returncode == 1 and said in result.stderr
    holder.kill()
    holder.wait()
    assert run("-m", "basalt.down", BASALT_VAR=str(tmp_path)).stdout == "Basalt is not running here.\n"


def test_a_machine_without_avx2_or_linux_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu sse2 avx avx512\n")
    monkeypatch.setattr(preflight, "CPUINFO", cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "AVX2" in preflight.machine_problems()[0]
    cpuinfo.write_text("flags\t\t: fpu sse2 avx avx2\n")
    assert preflight.machine_problems() == []
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert "Linux" in preflight.machine_problems()[0]


def test_too_little_memory_and_disk_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "RUN_MEMORY", 1 << 60)
    monkeypatch.setattr(preflight, "INSTALL_DISK", 1 << 60)
    assert any("of memory free" in problem for problem in preflight.start_problems())
    assert "installing needs" in preflight.disk_problems()[0]


def test_an_old_python_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "tools/install.py"
    ast.parse(path.read_text(), feature_version=(3, 6))  # an old Python must be able to read what it is told
    install = runpy.run_path(str(path))
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"needs Python 3.11 or newer; .* is 3.9"):
        install["require_python"]()
