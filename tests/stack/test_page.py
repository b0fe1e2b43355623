"""The chat page in a real browser, on the whole stack."""

import os
from pathlib import Path

import pytest

from .browser import CHROMIUM, ask, attach, chat_page
from .conftest import Stack
from .test_stack import sign

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


def test_attach_ask_and_ask_again(stack: Stack, tmp_path: Path) -> None:
    photo = tmp_path / "sign.png"
    photo.write_bytes(Path(os.environ["BASALT_PHOTO"]).read_bytes() if "BASALT_PHOTO" in os.environ else sign())
    with chat_page(stack.ui) as page:
        attach(page, photo)
        assert ask(page, "What animal is this?").strip()
        assert ask(page, "Is there a dog?").strip()
        assert page.get_by_test_id("stChatMessage").count() == 4
        if target := os.environ.get("BASALT_SCREENSHOT"):  # how docs/images/ui.png is made
            page.screenshot(path=target)
