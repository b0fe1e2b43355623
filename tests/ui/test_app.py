"""The chat page, run by Streamlit's own test harness against a gateway-shaped server."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

import services.ui
from services.ui.example import QUESTIONS, example_image
from tests.ui.gateway_shaped import REFUSED, GatewayShaped

PAGE = Path(services.ui.__file__).with_name("app.py")


@pytest.fixture
def page(gateway: GatewayShaped, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setenv("BASALT_GATEWAY_URL", gateway.url)
    return AppTest.from_file(PAGE, default_timeout=30).run()


TOLD = REFUSED[0].upper() + REFUSED[1:]


def photo(colour: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(out, "PNG")
    return out.getvalue()


def ask(page: AppTest, text: str, *files: tuple[str, bytes]) -> AppTest:
    page.chat_input[0].set_value(text)
    for name, data in files:
        page.chat_input[0].upload(name, data)
    page.run()
    assert not page.exception
    return page


def shown(page: AppTest) -> list[str]:
    return [element.value for message in page.chat_message for element in message.markdown]


def sent_images(body: dict) -> list[bytes]:
    parts = [part for message in body["messages"] if message["role"] == "user" for part in message["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.split(",", 1)[1]) for url in urls]


def test_asks_about_an_image_and_again_about_the_same(page: AppTest, gateway: GatewayShaped) -> None:
    ask(page, "What is it?", ("a.png", photo()))
    assert shown(page) == ["What is it?", "A red circle."]
    assert len(page.image) == 1
    gateway.pieces = ["Red."]
    ask(page, "Which colour?")
    assert shown(page) == ["What is it?", "A red circle.", "Which colour?", "Red."]
    assert [message["role"] for message in gateway.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert gateway.bodies[1]["messages"][1]["content"] == "A red circle."
    assert sent_images(gateway.bodies[1]) == [photo()]
    assert gateway.bodies[1]["stream"] is True


def test_sends_several_images_in_order(page: AppTest, gateway: GatewayShaped) -> None:
    ask(page, "Compare them.", ("a.png", photo("red")), ("b.png", photo("blue")))
    assert sent_images(gateway.bodies[0]) == [photo("red"), photo("blue")]


def test_an_image_alone_is_described(page: AppTest, gateway: GatewayShaped) -> None:
    ask(page, "", ("a.png", photo()))
    assert gateway.bodies[0]["messages"][0]["content"][-1] == {"type": "text", "text": "Describe the image."}


def test_the_example_is_asked_by_its_button(page: AppTest, gateway: GatewayShaped) -> None:
    next(button for button in page.button if button.label == QUESTIONS[0]).click().run()
    assert not page.exception
    assert shown(page) == [QUESTIONS[0], "A red circle."]
    assert sent_images(gateway.bodies[0]) == [example_image()]
    assert not [button for button in page.button if button.label == QUESTIONS[0]]  # the welcome has gone


def test_the_chosen_assistant_is_asked(page: AppTest, gateway: GatewayShaped) -> None:
    assert page.selectbox[0].options == ["basalt-tiny", "other"]
    page.selectbox[0].select("other").run()
    ask(page, "Hello?")
    assert gateway.bodies[0]["model"] == "other"


def test_a_new_conversation_forgets_the_image(page: AppTest, gateway: GatewayShaped) -> None:
    ask(page, "What is it?", ("a.png", photo()))
    next(button for button in page.button if button.label == "New conversation").click().run()
    assert shown(page) == []
    ask(page, "And now?")
    assert sent_images(gateway.bodies[-1]) == []


def test_a_refused_file_is_told_and_spoils_no_later_question(page: AppTest, gateway: GatewayShaped) -> None:
    ask(page, "What is it?", ("a.png", b"not an image"))
    assert [error.value for error in page.error] == [TOLD]
    ask(page, "And this?", ("b.png", photo()))
    assert shown(page)[-1] == "A red circle."
    assert sent_images(gateway.bodies[-1]) == [photo()]
    assert [error.value for error in page.error] == [TOLD]  # still there, beside its question


def test_an_answer_that_breaks_off_is_kept_with_the_reason(page: AppTest, gateway: GatewayShaped) -> None:
    gateway.breaks_after = 1
    ask(page, "What is it?")
    page.run()
    assert [text.strip() for text in shown(page)] == ["What is it?", "A red"]
    assert [error.value for error in page.error] == ["The llm service went away"]


def test_no_gateway_is_said_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASALT_GATEWAY_URL", "http://127.0.0.1:9")
    page = AppTest.from_file(PAGE, default_timeout=30).run()
    assert not page.exception
    assert "does not answer" in page.error[0].value and "make up" in page.error[0].value
    assert page.chat_input[0].disabled


def test_no_assistants_is_said_in_plain_words(page: AppTest, gateway: GatewayShaped) -> None:
    gateway.assistants = []
    page.run()
    assert "no assistant" in page.error[0].value
    assert page.chat_input[0].disabled
