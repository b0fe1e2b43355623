"""vLLM's causal LMs, taught to take an image as embeddings: no tower, no projector, no pixels.

The prompt reaches the processor with one `IMAGE_MARK` per image (services/llm/renderer.py puts it there). The
processor replaces the mark by as many placeholder ids as the image has tokens; the engine keys those positions by
the image's uuid (so the prefix cache covers them and what follows), and the model puts the embeddings there.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM, Qwen2Model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import (
    ImageEmbeddingItems,
    ModalityDataItems,
    MultiModalDataItems,
    MultiModalDataParser,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

IMAGE_MARK = -1  # stands for one image between renderer and processor; no text can tokenise to it


class _EmbeddingsParser(MultiModalDataParser):
    def _parse_image_data(self, data: object) -> ModalityDataItems | None:
        if data is None:
            return None
        if not self.is_embeddings(data):
            raise VLLMValidationError("an image must be a tensor [tokens, lm_dim]", parameter="image_embeds")
        return ImageEmbeddingItems(data, self.expected_hidden_size)


class EmbeddingsInfo(BaseProcessingInfo):
    def get_data_parser(self) -> MultiModalDataParser:
        return _EmbeddingsParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": seq_len}

    @property
    def placeholder_id(self) -> int:
        """The id at every position that an image takes. Its own embedding is never used; the last id of the
        vocabulary is a rare or reserved token, so that repetition penalties counted over the prompt hit no common one.
        """
        return self.ctx.model_config.get_vocab_size() - 1


class EmbeddingsDummyInputs(BaseDummyInputsBuilder[EmbeddingsInfo]):
    """Nothing to profile: there is no encoder."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        return {}


class EmbeddingsProcessor(BaseMultiModalProcessor[EmbeddingsInfo]):
    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"image_embeds": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        def placeholders(image: int) -> list[int]:
            tokens = mm_items.get_items("image", ImageEmbeddingItems).get_feature_size(image)
            return [self.info.placeholder_id] * tokens

        return [PromptReplacement(modality="image", target=[IMAGE_MARK], replacement=placeholders)]


class _TakesEmbeddings:
    """Put before one of vLLM's causal LMs and SupportsMultiModal, it merges image embeddings into the text's."""

    model: LlamaModel | Qwen2Model

    embed_input_ids = SupportsMultiModal.embed_input_ids

    def get_language_model(self) -> Any:
        return self.model

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """`image_embeds`, of all images of one engine step: [images, tokens, lm_dim], or a list of
        [tokens, lm_dim] where their token counts differ."""
        image_embeds = kwargs["image_embeds"]
        assert isinstance(image_embeds, Iterable)
        return [embeddings for embeddings in image_embeds if isinstance(embeddings, torch.Tensor)]


_takes_embeddings = MULTIMODAL_REGISTRY.register_processor(
    EmbeddingsProcessor, info=EmbeddingsInfo, dummy_inputs=EmbeddingsDummyInputs
)


@_takes_embeddings
class BasaltLlamaForCausalLM(_TakesEmbeddings, LlamaForCausalLM, SupportsMultiModal):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


@_takes_embeddings
class BasaltQwen2ForCausalLM(_TakesEmbeddings, Qwen2ForCausalLM, SupportsMultiModal):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


ARCHITECTURES: Mapping[str, type[LlamaForCausalLM | Qwen2ForCausalLM]] = {
    "LlamaForCausalLM": BasaltLlamaForCausalLM,
    "Qwen2ForCausalLM": BasaltQwen2ForCausalLM,
}
