"""From a conversation to token ids and labels, by one rendering of the chat template.

`<image>` is expanded here, before the model, to exactly the tower's visual tokens. Labels stand on the
assistant's text and its end token only: the template marks them with `{% generation %}`.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from basalt.data.readers import PLACEHOLDER

IGNORE = -100  # cross_entropy's own mark for "no label"

# Between two characters: they are never one token. Invisible (Unicode's "invisible separator"), and not itself
# learned or shown, so that a word read off a picture is written letter by letter and still comes out as a word.
SPELLED = "\u2063"

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Sample:
    """Token ids of one conversation; `labels[i]` is `ids[i]` where it is to be learned, else `IGNORE`.

    There are hundreds of thousands in memory, most of each the same visual token: they come as 32-bit arrays.
    """

    ids: Sequence[int]
    labels: Sequence[int]


class Tokenizer:
    """A base LM's tokenizer with the assistant's chat template and the expansion of `<image>`.

    Args:
        image_token_id: stands at every visual token's position. Its embedding is never looked up.
        visual_tokens: per image.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: str, image_token_id: int, visual_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.image_token_id = image_token_id
        self.visual_tokens = visual_tokens

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids of a conversation up to where the assistant is to speak."""
        rendered, _ = self._render(messages, generation_prompt=True)
        return [token for token, _, _ in self._tokens(rendered, _images(messages))]

    def sample(self, messages: list[dict[str, Any]]) -> Sample:
        """Ids and labels of a conversation to learn from; an answer of weight 0 is read, not learned.

        Raises:
            ValueError: placeholders and images do not match, or the template does not mark the assistant's text.
        """
        rendered, spans = self._render(messages, generation_prompt=False)
        if not spans:
            raise ValueError("nothing to learn: no assistant turn, or a chat template without {% generation %}")
        answers = [message for message in messages if message["role"] == "assistant"]
        if any(answer.get("weight") == 0 for answer in answers):
            if len(spans) != len(answers):
                raise ValueError(f"the chat template marks {len(spans)} of {len(answers)} answers: weights need all")
            spans = [span for span, answer in zip(spans, answers, strict=True) if answer.get("weight") != 0]
        ids, labels = array("i"), array("i")
        for token, start, end in self._tokens(rendered, _images(messages)):
            # Not told by its offsets: some tokenizers trim spaces from them, and leave a lone space none.
            visual = token == self.image_token_id
            supervised = not visual and any(low <= start and end <= high for low, high in spans)
            ids.append(token)
            labels.append(token if supervised else IGNORE)
        return Sample(ids, labels)

    def _render(self, messages: list[dict[str, Any]], *, generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        special: dict[str, Any] = self.tokenizer.special_tokens_map
        found: Any = render_jinja_template(
            [messages],
            chat_template=self.template,
            return_assistant_tokens_mask=not generation_prompt,
            add_generation_prompt=generation_prompt,
            **special,
        )
        rendered, spans = found
        return rendered[0], [] if generation_prompt else spans[0]

    def _tokens(self, rendered: str, images: int) -> list[tuple[int, int, int]]:
        """(id, start, end) with offsets into `rendered`; a visual token covers no characters."""
        found = rendered.count(PLACEHOLDER)
        if found != images:
            raise ValueError(
                f"the conversation has {images} images but its text renders to {found} {PLACEHOLDER} placeholders"
            )
        tokens: list[tuple[int, int, int]] = []
        offset = 0
        for number, text in enumerate(rendered.split(PLACEHOLDER)):
            if number:
                tokens += [(self.image_token_id, offset, offset)] * self.visual_tokens
                offset += len(PLACEHOLDER)
            for piece in text.split(SPELLED):
                encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
                spans = encoded["offset_mapping"]
                tokens += [
                    (token, offset + start, offset + end)
                    for token, (start, end) in zip(encoded["input_ids"], spans, strict=True)
                ]
                offset += len(piece) + len(SPELLED)
            offset -= len(SPELLED)
        return tokens


def _images(messages: list[dict[str, Any]]) -> int:
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return sum(part["type"] == "image" for part in parts)
