"""From chat messages to a prompt: vLLM's renderer, with images placed exactly.

A chat template writes `<image>` where an image part stands. The base LM's vocabulary need not have such a token: the
rendered text is cut there, the pieces are tokenised on their own (as in training) and one IMAGE_MARK is put between
them. A literal `<image>` in a user's text stays text: it is disguised while the template runs.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams, TokenizeParams

from services.llm.embeddings import CONNECTOR, EmbeddingsConnector, EmbeddingsSpec
from services.llm.models import IMAGE_MARK
from services.llm.settings import Settings

IMAGE = "<image>"  # in chat templates
TEXT_PARTS = {"text", "refusal", "thinking", "input_text", "output_text", "tool_reference"}
PIECES = "basalt_pieces"  # key in vLLM's prompt dict: the texts around its images


class EmbeddingsRenderer(HfRenderer):
    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        model = config.model_config
        spec = EmbeddingsSpec(model.get_inputs_embeds_size(), model.max_model_len, model.dtype, Settings().handoff_dir)
        # The registry makes a connector per request, by name and without the model's config: bind it here.
        MEDIA_CONNECTOR_REGISTRY.name2class[CONNECTOR] = partial(EmbeddingsConnector, spec)  # pyright: ignore[reportArgumentType]

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        chat = _Chat.read(messages, params)
        return chat.restore(*super().render_messages(chat.messages, chat.params))

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        chat = _Chat.read(messages, params)
        return chat.restore(*await super().render_messages_async(chat.messages, chat.params))

    def _tokenize_prompt(self, prompt: Any, params: TokenizeParams) -> Any:
        pieces = prompt.pop(PIECES, None)
        if pieces is None:
            return super()._tokenize_prompt(prompt, params)
        if params.truncate_prompt_tokens is not None:
            raise VLLMValidationError(
                "truncate_prompt_tokens would cut into images: leave it out of requests with images",
                parameter="truncate_prompt_tokens",
            )
        tokenizer = self.get_tokenizer()
        ids: list[int] = tokenizer(pieces[0], **params.get_encode_kwargs())["input_ids"]
        within = replace(params, add_special_tokens=False).get_encode_kwargs()
        for piece in pieces[1:]:
            ids = [*ids, IMAGE_MARK, *tokenizer(piece, **within)["input_ids"]]
        return self._build_tokens_prompt(ids, prompt)


@dataclass(frozen=True)
class _Chat:
    """One chat request on its way through the template."""

    messages: list[Any]
    params: ChatParams
    images: int
    disguise: str  # stands for a literal `<image>` of the user's

    @classmethod
    def read(cls, messages: list[Any], params: ChatParams) -> Self:
        messages = [_materialised(message) for message in messages]
        images = sum(_check_part(part) for message in messages for part in _parts(message))
        # Random, so that no text can hold it and restoring is exact.
        disguise = f"<image-{secrets.token_hex(16)}>"
        if images:
            hide = partial(_map_text, lambda text: text.replace(IMAGE, disguise))
            messages = [hide(message) for message in messages]
            params = replace(params, chat_template_kwargs=hide(params.chat_template_kwargs))
        return cls(messages, params, images, disguise)

    def restore(self, conversation: list[Any], prompt: Any) -> tuple[list[Any], Any]:
        """Undoes the disguise and cuts the prompt at its images."""
        if not self.images:
            return conversation, prompt
        pieces = prompt["prompt"].split(IMAGE)
        if len(pieces) != self.images + 1:
            raise VLLMValidationError(
                f"the request has {self.images} image(s), the chat template wrote {IMAGE} {len(pieces) - 1} time(s); "
                "a text must not be split within <image>",
                parameter="messages",
            )
        reveal = partial(_map_text, lambda text: text.replace(self.disguise, IMAGE))
        return reveal(conversation), {**prompt, "prompt": reveal(prompt["prompt"]), PIECES: reveal(pieces)}


def _materialised(message: Any) -> Any:
    """The message with its content as a list: pydantic may hand over a one-shot iterator."""
    content = message.get("content")
    return message if content is None or isinstance(content, str) else {**message, "content": list(content)}


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _check_part(part: Any) -> bool:
    """Whether the part is an image.

    Raises:
        VLLMValidationError: (a 400 to the client) it is neither text nor complete image_embeds.
    """
    if isinstance(part, str):
        return False
    kind = part.get("type")
    if kind in TEXT_PARTS:
        if part.get("uuid") is not None:  # vLLM would then go by the part's other fields, not by its type
            raise VLLMValidationError(f"a {kind} part has no field 'uuid'", parameter="messages")
        return False
    if kind != "image_embeds":
        raise VLLMValidationError(
            f"content parts must be of type text or image_embeds, not {kind!r}", parameter="messages"
        )
    for field, meaning in (
        ("image_embeds", "base64 of a safetensors blob, or the digest under which one lies"),
        ("uuid", "the digest of the embeddings: the key of every cache"),
    ):
        if not isinstance(part.get(field), str) or not part[field]:
            raise VLLMValidationError(f"an image_embeds part needs {field!r}: {meaning}", parameter="messages")
    if extra := set(part) - {"type", "image_embeds", "uuid"}:
        raise VLLMValidationError(f"an image_embeds part has no field {sorted(extra)[0]!r}", parameter="messages")
    return True


def _map_text(change: Callable[[str], str], value: Any) -> Any:
    """`value` with `change` applied to every text in it, embeddings apart."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_map_text(change, item) for item in value]
    if isinstance(value, Mapping):
        if value.get("type") == "image_embeds":
            return value
        return {key: _map_text(change, item) for key, item in value.items()}
    return value
