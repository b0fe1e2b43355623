"""A tiny real base LM: a random Llama and a byte-level tokenizer with SmolLM2's special tokens, built on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IMAGE_TOKEN_ID = 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<reserved_{number}>" for number in range(3, 17))]
END = SPECIAL.index("<|im_end|>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, the special tokens before them: 16 is reserved, as in SmolLM2."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIAL + bytes_)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        additional_special_tokens=SPECIAL[3:],
    )


def make_lm(directory: Path, *, seed: int = 0, width: int = 64) -> Path:
    """A `transformers` directory of a Llama of 2 layers with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,  # far enough from silence that a few steps of training show
        bos_token_id=SPECIAL.index("<|im_start|>"),
        eos_token_id=END,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
