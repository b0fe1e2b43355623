"""Writes beside every line of requirements.lock which of pyproject.toml's extras need it: `make lock` runs it last.

An image installs the lines of its service's extra and no others (tools/install_image.py). What needs what is read from
the packages as they are installed here, so this runs in the environment that the lock was installed into.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lock import SKIPPED, VLLM, WEIGHTS_ONLY, canonical, name_of
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
CORE = "core"  # every service's
VLLM_NAME = name_of(VLLM)


def main() -> None:
    LOCK.write_text(annotated())


def annotated() -> str:
    """The lock with the extras beside each line."""
    needs = extras_of_each()
    lines = []
    for line in LOCK.read_text().splitlines():
        pin = line.partition("  #")[0]
        lines.append(line if line.startswith("#") else f"{pin}  # {' '.join(sorted(needs.get(name_of(pin), ())))}")
    return "\n".join(line.rstrip(" #") for line in lines) + "\n"


def extras_of_each() -> dict[str, set[str]]:
    """Package → the extras that need it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {CORE: project["dependencies"], **project["optional-dependencies"]}
    needs: dict[str, set[str]] = {}
    for extra, requirements in groups.items():
        for name in closure([Requirement(line) for line in requirements], groups):
            needs.setdefault(name, set()).add(extra)
    return needs


def closure(wanted: list[Requirement], groups: dict[str, list[str]]) -> set[str]:
    """The names of everything that these requirements bring with them, themselves included."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        requirement = wanted.pop()
        name, extras = canonical(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add((name, extras))
        if name == "basalt":
            wanted += [Requirement(line) for extra in extras for line in groups[extra]]
        elif name not in SKIPPED or name in ("torch", VLLM_NAME):
            found.add(name)
            wanted += [] if name == WEIGHTS_ONLY else required_by(name, extras)
    return found


def required_by(name: str, extras: frozenset[str]) -> list[Requirement]:
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        raise SystemExit(f"{name} is not installed here: run this where requirements.lock is installed") from None
    requirements = [Requirement(line) for line in lines]
    marked = [{"extra": extra} for extra in ("", *extras)]
    chosen = [each for each in requirements if not each.marker or any(each.marker.evaluate(m) for m in marked)]
    for requirement in chosen:
        requirement.marker = None
    return chosen


if __name__ == "__main__":
    main()
