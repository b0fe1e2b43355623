"""Text-only prompts, and the base LM's own answers to them, from real Llama models with hand-set weights."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from basalt.data.chat import answer_prompts, chat_prompts
from basalt.data.readers import read_rows

WORDS = ["<pad>", "<end>", "<go>", "Why?", "So", "what?", "It", "is", "so.", "Yes", "and"]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}<go>"


def bigram_lm(directory: Path, follows: dict[str, str]) -> Path:
    """A Llama that says after each word the one in `follows`: its layer adds nothing, its head is that table."""
    ids = {text: index for index, text in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    size = 16
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=False, eos_token_id=ids["<end>"], pad_token_id=ids["<pad>"], bos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in lm.model.layers.parameters():
            parameter.zero_()
        lm.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), size))
        lm.lm_head.weight.zero_()
        for word, following in follows.items():
            lm.lm_head.weight[ids[following], ids[word]] = 10.0
    lm.save_pretrained(directory)
    return directory


def test_prompts_are_many_distinct_and_leave_the_probe_out() -> None:
    prompts = chat_prompts()
    assert len(prompts) == len(set(prompts)) > 900
    assert not any("France" in prompt or "{" in prompt for prompt in prompts)
    assert chat_prompts(0) == prompts
    assert chat_prompts(1) != prompts
    assert sorted(chat_prompts(1)) == sorted(prompts)


@pytest.mark.parametrize(
    ("chain", "answer"),
    [
        ("<go> It is so. <end>", "It is so."),
        ("<go> Yes <end>", "Yes"),  # short, but the LM's own end
        ("<go> It is so. Yes and Yes", "It is so."),  # cut off: back to the last whole sentence
        ("<go> Yes and Yes", None),  # cut off before any sentence ended
    ],
)
def test_answers_end_where_a_sentence_does(tmp_path: Path, chain: str, answer: str | None) -> None:
    words = chain.split()
    lm = bigram_lm(tmp_path / "lm", dict(pairwise(words)))
    out = tmp_path / "chat.json"
    prompts = ["Why?", "So what?", "It is so what?"]  # of different lengths in one batch
    assert answer_prompts(lm, prompts, out, max_new_tokens=8, batch=2) == (len(prompts) if answer else 0)
    rows = json.loads(out.read_text())
    assert [[turn["value"] for turn in row["conversations"]] for row in rows] == (
        [[prompt, answer] for prompt in prompts] if answer else []
    )
    assert [row.images for row in read_rows(out)] == [()] * len(rows)
