"""The pages to look through samples, in a real browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from typer.testing import CliRunner

from basalt.cli import app
from basalt.eval.browse import browse
from basalt.eval.results import load_result
from tests.eval.test_report import asked, stored

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "</script><script>document.title = 'hijacked'</script>"
    "<img src=x onerror=\"document.title='hijacked'\"> \ud800 \u2028"
)


@pytest.fixture
def page() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser.new_page()
        browser.close()


def test_flips_are_looked_at_with_their_pictures(tmp_path: Path, page: Page) -> None:
    old = stored(tmp_path, "old", 60)
    new = stored(tmp_path, "new", 50, validation_Math_0=HOSTILE, validation_Math_87="A")
    out = tmp_path / "pages"
    done = CliRunner().invoke(app, ["eval", "browse", str(new), "--against", str(old), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert len(list((out / "images").iterdir())) == 3  # one for each picture, not for each question
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto((out / "index.html").as_uri())
    cards = page.locator("article")
    expect(page.locator("#count")).to_have_text("11 of 90 samples")  # right before, and wrong now
    expect(cards).to_have_count(11)
    first = cards.first
    expect(first.locator(".prompt")).to_contain_text("Which is it, number 0?")
    expect(first.locator(".text").nth(0)).to_have_text("A")
    assert "</script><script>" in (first.locator(".text").nth(1).text_content() or "")
    assert page.title() == "mmmu: new"
    assert page.evaluate("document.querySelector('article img').decode().then(() => true)")
    page.select_option("#outcome", "won")
    expect(cards).to_have_count(1)
    page.select_option("#outcome", "all")
    expect(page.locator("#count")).to_have_text("90 of 90 samples")
    expect(cards).to_have_count(30)
    page.get_by_role("button", name="Show more").click()
    expect(cards).to_have_count(60)
    page.select_option("#group", "History")
    expect(cards).to_have_count(30)
    page.select_option("#group", "")
    page.select_option("#rule", "drawn")
    expect(cards).to_have_count(1)
    page.select_option("#rule", "")
    page.fill("#words", "number 41?")
    expect(cards).to_have_count(1)
    assert not troubles


def test_a_picture_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = asked(stored(tmp_path, "new", 60), "tiny")
    browse(load_result(path), tmp_path / "pages")
    page = (tmp_path / "pages" / "index.html").read_text()
    told = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(told["samples"]) == 90 and told["samples"][0]["before"] is None
    assert all(one["pictures"] and not one["unread"] for one in told["samples"])


def test_other_data_is_not_shown_beside_the_answers(tmp_path: Path) -> None:
    path = stored(tmp_path, "new", 60)
    with (tmp_path / "validation.parquet").open("ab") as file:
        file.write(b"more")
    done = CliRunner().invoke(app, ["eval", "browse", str(path), "--out", str(tmp_path / "pages")])
    assert done.exit_code == 1 and "is not the data that was asked" in done.output.replace("\n", "")
