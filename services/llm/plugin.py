"""The entry point `vllm.general_plugins`: makes Basalt's parts known in every process of vLLM."""

from typing import Any

RENDERER = "basalt"  # the value of --tokenizer-mode


def register() -> None:
    """Called by vLLM in the API server and in the engine. Safe to call again."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from services.llm.models import ARCHITECTURES

    for model in ARCHITECTURES.values():
        ModelRegistry.register_model(model.__name__, model)
    # A tokenizer mode names a tokenizer and a renderer: the ordinary Hugging Face tokenizer, and our renderer.
    TokenizerRegistry.tokenizers[RENDERER] = ("vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.renderers[RENDERER] = ("services.llm.renderer", "EmbeddingsRenderer")
    if current_platform.is_cpu():
        from services.llm import kernels_cpu  # noqa: F401  (its classes take the place of vLLM's)

        platform: Any = type(current_platform)
        platform.get_punica_wrapper = classmethod(lambda _: "services.llm.lora_cpu.MaskedLoRA")
        # An operator that hides attention from torch.compile, which never runs there, costs more than the attention.
        platform.opaque_attention_op = classmethod(lambda _: False)
