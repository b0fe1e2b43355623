"""A conversation about images, and how it is asked of the gateway. Knows nothing of the page."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field

import openai
from openai.types.chat import ChatCompletionMessageParam

TIMEOUT_SECONDS = 300  # for one answer; a small machine under load is slow


@dataclass
class Turn:
    """A question with the images attached to it, and its answer as far as it has come."""

    question: str
    images: list[bytes] = field(default_factory=list)  # the files as they are
    answer: str = ""
    problem: str = ""  # why there is no (whole) answer, in plain words


class Gateway:
    """The public API, asked through the OpenAI client."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url
        self._client = openai.OpenAI(
            base_url=f"{url}/v1", api_key=key or "none", timeout=TIMEOUT_SECONDS, max_retries=0
        )

    def assistants(self) -> list[str]:
        """Names that can be asked.

        Raises:
            openai.APIError: `explain` tells it in plain words.
        """
        return [model.id for model in self._client.with_options(timeout=10).models.list()]

    def answer(self, assistant: str, turns: list[Turn]) -> Iterator[str]:
        """Streams the answer to the last turn in pieces; earlier turns are what was said before.

        Raises:
            openai.APIError: `explain` tells it in plain words.
        """
        with self._client.chat.completions.create(model=assistant, messages=messages(turns), stream=True) as stream:
            for chunk in stream:
                if chunk.choices and (piece := chunk.choices[0].delta.content):
                    yield piece

    def explain(self, error: openai.APIError) -> str:
        """What went wrong and what to do, for someone who knows nothing of HTTP."""
        if isinstance(error, openai.APITimeoutError):
            return f"The gateway at {self.url} did not answer in time. Try again."
        if isinstance(error, openai.APIConnectionError):
            return f"The gateway at {self.url} does not answer. Is it running? `make up` starts everything."
        if isinstance(error.body, dict) and (message := error.body.get("message")):
            return sentence(str(message))
        return sentence(error.message)


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def messages(turns: list[Turn]) -> list[ChatCompletionMessageParam]:
    """The conversation as the API takes it. Turns that got no answer are left out, the last one apart.

    One image that cannot be read would otherwise spoil every question after it.
    """
    sent: list[ChatCompletionMessageParam] = []
    for turn in turns:
        if turn is not turns[-1] and (turn.problem or not turn.answer):
            continue
        sent.append(
            {
                "role": "user",
                "content": [
                    *({"type": "image_url", "image_url": {"url": data_url(image)}} for image in turn.images),
                    {"type": "text", "text": turn.question},
                ],
            }
        )
        if turn is not turns[-1]:
            sent.append({"role": "assistant", "content": turn.answer})
    return sent


def data_url(image: bytes) -> str:
    """The gateway goes by an image's content, so the type named here need not be right."""
    return "data:image/*;base64," + base64.b64encode(image).decode()
