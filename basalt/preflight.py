"""What must hold before the stack can be installed or started, told in plain words.

Standard library only: `tools/install.py` asks here before anything is installed.
"""

import errno
import fcntl
import os
import platform
import shutil
import socket
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
VAR = Path(os.environ.get("BASALT_VAR", ROOT / "var"))  # logs, stored images, the prepared base LM, the running mark

HOST = "127.0.0.1"
PORTS = {  # service: (the variable that changes its port, default)
    "vision": ("BASALT_VISION_PORT", 50051),
    "llm": ("BASALT_LLM_PORT", 8000),
    "gateway": ("BASALT_GATEWAY_PORT", 8080),
    "ui": ("BASALT_UI_PORT", 8501),
    "trainer": ("BASALT_TRAINER_PORT", 8090),
    "evaluator": ("BASALT_EVALUATOR_PORT", 8091),
    "redis": ("BASALT_REDIS_PORT", 6390),
}
CPUINFO = Path("/proc/cpuinfo")
GIB = 1024**3
INSTALL_DISK = 5 * GIB  # the virtual environment and pip's cache of it
RUN_MEMORY = 5 * GIB


def port(service: str) -> int:
    variable, default = PORTS[service]
    value = os.environ.get(variable, str(default))
    if not (value.isdigit() and 0 < int(value) < 65536):
        raise SystemExit(f"{variable}={value} is not a port: give a number from 1 to 65535")
    return int(value)


def machine_problems() -> list[str]:
    """Why this machine cannot run the embedded default at all."""
    if platform.system() != "Linux":
        return [f"{platform.system()} is not supported: vLLM's CPU build needs Linux (on Windows, use WSL 2)"]
    if platform.machine() == "x86_64" and "avx2" not in CPUINFO.read_text().split():
        return ["this CPU has no AVX2 (no 'avx2' in /proc/cpuinfo): vLLM's CPU build needs it"]
    return []


def disk_problems() -> list[str]:
    free = shutil.disk_usage(ROOT).free
    if free < INSTALL_DISK:
        return [f"{free / GIB:.1f} GiB free under {ROOT}: installing needs {INSTALL_DISK / GIB:.0f} GiB"]
    return []


def start_problems() -> list[str]:
    """Why the stack cannot start now: ports in use, too little memory."""
    problems = [
        f"port {port(name)} ({name}) is taken by another program: stop it, or choose another with {variable}=…"
        for name, (variable, _) in PORTS.items()
        if not free(port(name))
    ]
    ports = [port(name) for name in PORTS]
    if len(set(ports)) < len(ports):
        variables = ", ".join(variable for variable, _ in PORTS.values())
        problems.append(f"two services have the same port: give each its own with {variables}")
    available = available_memory()
    if available < RUN_MEMORY:
        problems.append(f"{available / GIB:.1f} GiB of memory free: the stack needs {RUN_MEMORY / GIB:.0f} GiB")
    return problems


def free(number: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, number))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def hold_running_mark() -> IO[str] | None:
    """Locks `var/running` with this process's id until the file is closed or the process ends.

    None if another process holds it. A lock, not a bare pid file: one left by a crash holds nothing.
    """
    VAR.mkdir(parents=True, exist_ok=True)
    mark = (VAR / "running").open("a+")
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        mark.close()
        return None
    mark.truncate(0)
    mark.write(str(os.getpid()))
    mark.flush()
    return mark


def running_pid() -> int | None:
    """The process that runs the stack from this directory, if one does."""
    try:
        mark = (VAR / "running").open("r+")
    except FileNotFoundError:
        return None
    with mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(mark.read() or 0)
    return None
