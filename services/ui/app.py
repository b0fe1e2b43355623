"""The chat page. It speaks only HTTP to the gateway. Streamlit runs this file from the top at every event."""

import io

import openai
import streamlit as st

from basalt.data.images import ImageError, decode_image
from services.ui.conversation import Gateway, Turn
from services.ui.example import QUESTIONS, example_image
from services.ui.settings import Settings

IMAGE_TYPES = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"]
AVATAR = "🪨"
THUMBNAIL = 360  # pixels, the longer side
DEFAULT_QUESTION = "Describe the image."

settings = Settings()
gateway = Gateway(settings.gateway_url, settings.gateway_key.get_secret_value())


def main() -> None:
    st.set_page_config(page_title="Basalt", page_icon=AVATAR, layout="centered")
    turns: list[Turn] = st.session_state.setdefault("turns", [])
    assistant = sidebar()
    asked = st.chat_input(
        "Ask about an image: attach it, drop it here or paste it",
        accept_file="multiple",
        file_type=IMAGE_TYPES,
        max_upload_size=settings.max_image_mb,
        disabled=assistant is None,
    )
    new: Turn | None = st.session_state.pop("example", None)
    if asked and (asked.text.strip() or asked.files):
        new = Turn(asked.text.strip() or DEFAULT_QUESTION, [file.getvalue() for file in asked.files])
    if not turns and not new:
        welcome(enabled=assistant is not None)
    for turn in turns:
        show_question(turn)
        with st.chat_message("assistant", avatar=AVATAR):
            show_answer(turn)
    if new and assistant:
        turns.append(new)
        show_question(new)
        with st.chat_message("assistant", avatar=AVATAR):
            stream_answer(assistant, turns)


def sidebar() -> str | None:
    """The chosen assistant; None, with the reason on the page, where there is none to choose."""
    with st.sidebar:
        st.title(f"{AVATAR} Basalt", anchor=False)
        if st.button("New conversation", icon=":material/add_comment:", width="stretch"):
            st.session_state.turns.clear()
            st.rerun()
        try:
            names = gateway.assistants()
        except openai.APIError as error:
            st.error(gateway.explain(error))
            st.button("Try again", icon=":material/refresh:", width="stretch")
            return None
        if not names:
            st.error("The gateway has no assistant to ask. Put one into the models folder and start again.")
            return None
        chosen = st.selectbox("Assistant", names)
        st.caption("An image stays in the conversation: ask about it again. A new conversation forgets it.")
        return chosen


def welcome(*, enabled: bool) -> None:
    st.header("Ask a picture a question", anchor=False)
    st.write("Attach, drop or paste an image of yours below, or try this one:")
    picture, questions = st.columns([3, 2], vertical_alignment="center")
    picture.image(example_image())
    for question in QUESTIONS:
        if questions.button(question, width="stretch", disabled=not enabled):
            st.session_state.example = Turn(question, [example_image()])
            st.rerun()


def show_question(turn: Turn) -> None:
    with st.chat_message("user", avatar=":material/person:"):
        for image in turn.images:
            try:
                st.image(thumbnail(image))
            except ImageError:
                st.caption("(a file that cannot be shown as an image)")  # the answer says what is wrong with it
        st.markdown(turn.question)


def stream_answer(assistant: str, turns: list[Turn]) -> None:
    """Shows the last turn's answer as it comes, and keeps it in the turn: also what came before a failure."""
    turn = turns[-1]

    def pieces():
        for piece in gateway.answer(assistant, turns):
            turn.answer += piece
            yield piece

    try:
        st.write_stream(pieces, cursor="▍")
    except openai.APIError as error:
        turn.problem = gateway.explain(error)
        st.error(turn.problem)


def show_answer(turn: Turn) -> None:
    if turn.answer:
        st.markdown(turn.answer)
    if turn.problem:
        st.error(turn.problem)
    elif not turn.answer:
        st.caption("(no answer)")


@st.cache_data(max_entries=64, show_spinner=False)
def thumbnail(image: bytes) -> bytes:
    """PNG of the image as the assistant sees it: upright, without transparency.

    Raises:
        ImageError: it is not an image.
    """
    picture = decode_image(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


main()
