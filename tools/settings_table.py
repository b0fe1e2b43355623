"""Writes docs/settings.md: every setting of every service, from their pydantic settings. `make settings`

What a setting is for is the comment that stands with it in the source.
"""

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/settings.md"
HEAD = """# Settings

Made by `make settings` from the services' own settings; do not edit. All of them are environment variables; a service
that cannot use one says so at its start, in one line, and ends with exit code 2. Traces are set by OpenTelemetry's own
variables: [operations.md](operations.md#traces).
"""


@dataclass(frozen=True)
class Setting:
    variable: str
    kind: str
    default: str
    purpose: str


def main() -> None:
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)} is current")


def page() -> str:
    services = {path.parent.name: settings_of(path.parent.name) for path in sorted(ROOT.glob("services/*/settings.py"))}
    readers: dict[Setting, list[str]] = {}
    for service, settings in services.items():
        for setting in settings:
            readers.setdefault(setting, []).append(service)
    shared = {setting: names for setting, names in readers.items() if len(names) > 1}
    parts = [HEAD, "## Shared\n", table([(s, ", ".join(names)) for s, names in sorted(shared.items(), key=by_name)])]
    for service, settings in services.items():
        parts += [f"## {service}\n", table([(setting, None) for setting in settings if setting not in shared])]
    return "\n".join(parts)


def by_name(item: tuple[Setting, list[str]]) -> str:
    return item[0].variable


def table(rows: list[tuple[Setting, str | None]]) -> str:
    head = "| variable | type | default | what |" + (" read by |" if rows and rows[0][1] else "")
    lines = [head, re.sub(r"[^|]+", "---", head)]
    for setting, names in rows:
        line = f"| `{setting.variable}` | {setting.kind} | {setting.default} | {setting.purpose} |"
        lines.append(line + (f" {names} |" if names else ""))
    return "\n".join(lines) + "\n"


def settings_of(service: str) -> list[Setting]:
    settings: type[BaseSettings] = importlib.import_module(f"services.{service}.settings").Settings
    prefix = settings.model_config.get("env_prefix", "")
    return [
        Setting(
            str(field.validation_alias or f"{prefix}{name}".upper()),
            kind(field),
            default(field),
            purpose(settings, name),
        )
        for name, field in settings.model_fields.items()
    ]


def kind(field: FieldInfo) -> str:
    text = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    text = re.sub(r"\b(typing|pathlib|pydantic\.types)\.", "", text).replace("Literal", "")
    for python, plain in (("SecretStr", "secret"), ("|", "or"), ("[str]", " of str"), ("frozenset", "list"), ("'", "")):
        text = text.replace(python, plain)
    return text.strip("[]")


def default(field: FieldInfo) -> str:
    value: Any = field.default
    if value is PydanticUndefined:
        return "found out" if field.default_factory else "must be set"
    if value is None or value == "" or value == frozenset() or str(value) == "**********":
        return "–"
    return f"`{value}`"


def purpose(settings: type[BaseSettings], name: str) -> str:
    """The comment at the end of a field's line, or on the lines before it."""
    owner = next(base for base in settings.__mro__ if name in inspect.get_annotations(base))
    lines = [line.strip() for line in inspect.getsourcelines(owner)[0]]
    at = next(number for number, line in enumerate(lines) if re.match(rf"{name}\s*:", line))
    end = next(number for number in range(at, len(lines)) if balanced(lines[at : number + 1]))
    told = re.search(r"\s#\s(.*)$", lines[end])
    if told:
        return told[1]
    before: list[str] = []
    while lines[at - 1].startswith("#"):
        at -= 1
        before.insert(0, lines[at].removeprefix("#").strip())
    return " ".join(before)


def balanced(lines: list[str]) -> bool:
    text = " ".join(line.partition("  #")[0] for line in lines)
    return text.count("(") == text.count(")")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
