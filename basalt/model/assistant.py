"""A whole assistant in this process: for training's samples, evaluation without services, and parity tests."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from basalt.assistants import Assistant, AssistantError
from basalt.data.preprocess import Tokenizer
from basalt.model.multimodal_llama import MultimodalLlama
from basalt.model.projector import load_projector
from basalt.model.vision_encoder import load_vision_encoder


class LocalAssistant:
    """Tower, projector, base LM and LoRA of one assistant, ready to answer.

    Args:
        base_lm: the Hugging Face directory of the base LM.
    """

    def __init__(self, assistant: Assistant, base_lm: Path, dtype: torch.dtype = torch.float32) -> None:
        spec = assistant.manifest
        lm = load_lm(assistant, base_lm, dtype)
        tower, projector = load_vision_encoder(spec.tower), load_projector(assistant)
        image_token_id = spec.base_lm.image_token_id
        self.model = MultimodalLlama(tower, projector, lm, image_token_id).eval()
        template = assistant.path(spec.chat_template).read_text()
        self.tokenizer = Tokenizer(AutoTokenizer.from_pretrained(base_lm), template, image_token_id, spec.tower.tokens)

    def answer(self, conversations: list[tuple[list[dict[str, Any]], list[Image.Image]]], **options: Any) -> list[str]:
        """Answers conversations, each with its images in order; `options` go to transformers' `generate`."""
        tower = self.model.tower
        assert tower is not None
        images = [image for _, its_images in conversations for image in its_images]
        visual = (
            self.model.visual_tokens(torch.stack([tower.preprocess(image) for image in images])) if images else None
        )
        prompts = [self.tokenizer.prompt(messages) for messages, _ in conversations]
        ids, mask = _left_pad(prompts, pad_id=0)
        settings = {"max_new_tokens": 64, "do_sample": False} | options
        end = self.tokenizer.tokenizer.eos_token_id
        new = self.model.generate(ids, mask, visual, eos_token_id=end, pad_token_id=end, **settings)
        return [text.strip() for text in self.tokenizer.tokenizer.batch_decode(new, skip_special_tokens=True)]


def load_lm(assistant: Assistant, base_lm: str | Path, dtype: torch.dtype) -> Any:
    """The base LM with the assistant's LoRA, in eval mode.

    Raises:
        AssistantError: the assistant was made for an LM of another width.
    """
    spec = assistant.manifest
    lm: Any = AutoModelForCausalLM.from_pretrained(base_lm, dtype=dtype)
    if lm.config.hidden_size != spec.base_lm.lm_dim:
        raise AssistantError(
            f"{spec.name} is made for {spec.base_lm.id} of width {spec.base_lm.lm_dim}, "
            f"{base_lm} has width {lm.config.hidden_size}"
        )
    if spec.lora is not None:
        lm = PeftModel.from_pretrained(lm, str(assistant.path(spec.lora.dir)))
    return lm.eval()


def _left_pad(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, T]`."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
