"""The chat page in a real Chromium, used as a person would: by what it shows."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# No calls home at start; without a sandbox where tests run as root in a container.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ANSWER_MS = 120_000  # a small machine under load is slow


@contextmanager
def chat_page(url: str, *, width: int = 1180, height: int = 860) -> Iterator[Page]:
    """A fresh browser on the chat page, ready for a question."""
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=QUIET, viewport={"width": width, "height": height}
        )
        page = browser.pages[0]
        page.goto(url)
        expect(page.get_by_test_id("stChatInputTextArea")).to_be_enabled(timeout=60_000)
        yield page
        browser.close()


def attach(page: Page, image: Path) -> None:
    """Chooses a file through the page's own file input and waits until it is uploaded."""
    page.get_by_test_id("stChatInput").locator("input[type=file]").set_input_files(image)
    expect(page.get_by_text(image.name)).to_be_visible()


def paste(page: Page, image: bytes) -> None:
    """Pastes a PNG as the browser does after it was copied from another window."""
    page.get_by_test_id("stChatInputTextArea").evaluate(
        """(area, bytes) => {
            const clipboard = new DataTransfer();
            clipboard.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
            area.dispatchEvent(new ClipboardEvent("paste", {clipboardData: clipboard, bubbles: true}));
        }""",
        list(image),
    )
    expect(page.get_by_text("pasted.png")).to_be_visible()


def ask(page: Page, question: str) -> str:
    """Types the question, sends it, and returns the whole answer when the page has finished."""
    said = page.get_by_test_id("stChatMessage")
    before = said.count()
    area = page.get_by_test_id("stChatInputTextArea")
    area.fill(question)
    expect(page.get_by_test_id("stChatInputSubmitButton")).to_be_enabled(timeout=ANSWER_MS)  # all files are there
    area.press("Enter")
    expect(said).to_have_count(before + 2, timeout=ANSWER_MS)
    expect(said.nth(before)).to_contain_text(question)
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(timeout=ANSWER_MS)
    answer = said.nth(before + 1).get_by_test_id("stMarkdownContainer")
    expect(answer).not_to_be_empty(timeout=ANSWER_MS)
    return answer.inner_text()
