"""Every assistant under its own name: LoRA and chat template are found when it is first asked for.

vLLM knows one chat template and a fixed list of LoRAs, or resolvers that know nothing but LoRAs. The two classes of its
API server that decide this are given a successor each; the rest of vLLM stays as it is.
"""

import asyncio
from contextvars import ContextVar
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from prometheus_client import Counter
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList
from vllm.lora.request import LoRARequest
from vllm.renderers.online_renderer import OnlineRenderer

from basalt.assistants import Assistant, AssistantError
from basalt.catalog import Catalog, UnknownAssistant
from basalt.object_store import StoreUnavailable
from services.llm import structured_outputs, tools
from services.llm.fit import BaseLM, Misfit, check_fit, check_weights

FOUND = Counter("basalt_llm_assistants_found", "Assistants looked for when first asked for, by outcome.", ["outcome"])
CHATS = Counter("basalt_llm_chats", "Chat prompts rendered.", ["assistant"])

_asked: ContextVar[str] = ContextVar("asked")  # the model that the current request names


class Served:
    """The assistants that requests have named so far, by the name they were given."""

    def __init__(self, catalog: Catalog, base_lm: BaseLM, max_lora_rank: int) -> None:
        self.catalog = catalog
        self._base_lm = base_lm
        self._max_lora_rank = max_lora_rank
        self._found: dict[str, Assistant] = {}

    async def find(self, name: str) -> Assistant:
        """The assistant that a reference means.

        Raises:
            UnknownAssistant, AssistantError, StoreUnavailable: see `Catalog.find`.
            Misfit: it cannot be served from this base LM.
        """
        assistant = await self.catalog.find(name)
        check_fit(assistant, self._base_lm, self._max_lora_rank)
        self._found[name] = assistant
        return assistant

    def is_plain(self, name: str) -> bool:
        """Whether it is an assistant found before that has no LoRA."""
        return name in self._found and self._found[name].manifest.lora is None

    def template(self, name: str | None) -> str | None:
        """The chat template of an assistant found before."""
        assistant = self._found.get(name or "")
        return assistant.path(assistant.manifest.chat_template).read_text() if assistant else None

    def label(self, name: str | None) -> str:
        """The assistant's name without its version, for metrics."""
        return self._found[name].name if name in self._found else "base-lm"


def install(served: Served) -> None:
    """Before vLLM's API server is started in this process."""
    successors = {"OpenAIServingModels": AssistantModels, "OnlineRenderer": AssistantRenderer}
    for name, successor in successors.items():
        assert hasattr(app_state, name), f"this vLLM makes its {name} elsewhere"
        setattr(app_state, name, partial(successor, served))


class AssistantModels(OpenAIServingModels):
    """Names to LoRAs. Loaded ones stay known by name; which of them the engine holds, it decides by use."""

    def __init__(self, served: Served, engine_client: Any, base_model_paths: list[BaseModelPath], **options: Any):
        super().__init__(engine_client, base_model_paths, **options)
        self._served = served

    def is_base_model(self, model_name: str) -> bool:
        if super().is_base_model(model_name) or self._served.is_plain(model_name):
            _asked.set(model_name)
            return True
        return False

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return super().model_name(lora_request) if lora_request else _asked.get(super().model_name())

    async def resolve_lora(self, lora_name: str) -> LoRARequest | ErrorResponse:
        """Called for a name that is neither a base model's nor a loaded LoRA's."""
        async with self.lora_resolver_lock[lora_name]:
            if lora_name in self.lora_requests:
                return self.lora_requests[lora_name]
            try:
                found = await self._load(lora_name)
            except UnknownAssistant as error:
                FOUND.labels("unknown").inc()
                return create_error_response(str(error), "NotFoundError", HTTPStatus.NOT_FOUND, "model")
            except (Misfit, AssistantError) as error:
                FOUND.labels("refused").inc()
                return create_error_response(str(error), "BadRequestError", HTTPStatus.BAD_REQUEST, "model")
            except StoreUnavailable as error:
                FOUND.labels("no object store").inc()
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
            FOUND.labels("found").inc()
            return found

    async def _load(self, name: str) -> LoRARequest:
        assistant = await self._served.find(name)
        lora = assistant.manifest.lora
        if lora is None:  # any LoRARequest means yes; then vLLM asks `is_base_model` again
            return LoRARequest(name, 1, str(assistant.directory))
        directory = assistant.path(lora.dir).resolve()
        await asyncio.to_thread(check_weights, directory, name)
        number = self.lora_id_counter.inc(1)
        request = LoRARequest(name, number, str(directory))
        try:
            await self.engine_client.add_lora(request)
        except Exception as error:  # the engine's own words come through as text, of whatever type
            raise Misfit(f"{name}: the engine cannot load its LoRA: {error}") from error
        self.lora_requests[name] = request
        return request

    async def show_available_models(self) -> ModelList:
        models = await super().show_available_models()
        listed = {card.id for card in models.data}
        base = self.base_model_paths[0].name
        models.data += [ModelCard(id=n, parent=base) for n in self._served.catalog.local if n not in listed]
        return models


class AssistantRenderer(OnlineRenderer):
    """Each assistant's prompts by its own chat template, tools written for those that write none."""

    def __init__(self, served: Served, *arguments: Any, tool_parser: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, tool_parser=tool_parser, **options)
        self._served = served
        self._reads_hermes = tool_parser == tools.PARSER

    async def preprocess_chat(
        self,
        request: Any,
        messages: list[Any],
        default_template: str | None,
        *arguments: Any,
        tool_dicts: list[dict[str, Any]] | None = None,
        parser: Any = None,
        **options: Any,
    ) -> Any:
        CHATS.labels(self._served.label(request.model)).inc()
        is_chat = isinstance(request, ChatCompletionRequest)  # or only to be tokenised
        if is_chat:
            structured_outputs.check_schemas(request)
            structured_outputs.pin_arguments(request)
        template = self._served.template(request.model) or default_template
        if self._reads_hermes and not tools.writes_tools(template or ""):
            messages, tool_dicts = tools.as_text(messages, tool_dicts), None
        options |= {"tool_dicts": tool_dicts, "parser": parser}
        prompt = await super().preprocess_chat(request, messages, template, *arguments, **options)
        if is_chat:
            structured_outputs.bound_whitespace(request)
        return prompt
