"""The table of all settings is what the services' settings are."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_current() -> None:
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path[:0] = ['tools', '.']; import settings_table as t; print(t.page(), end='')",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == (ROOT / "docs/settings.md").read_text(), "run `make settings`"
