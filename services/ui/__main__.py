"""Starts the chat page: `python -m services.ui`."""

import os
import sys
from pathlib import Path

from services.ui.settings import Settings


def main() -> None:
    settings = Settings()
    page = Path(__file__).with_name("app.py")
    options = [f"--server.address={settings.host}", f"--server.port={settings.port}"]
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(page), *options])


if __name__ == "__main__":
    main()
