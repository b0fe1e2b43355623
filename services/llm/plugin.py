"""The entry point `vllm.general_plugins`: makes Basalt's parts known in every process of vLLM."""

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
        grouped = classmethod(lambda platform: "services.llm.lora_cpu.GroupedLoRA")
        type(current_platform).get_punica_wrapper = grouped  # pyright: ignore[reportAttributeAccessIssue]
