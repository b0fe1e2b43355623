"""What the model says as it is trained: answers about the same few held-out images, to be read beside the curves."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from basalt.data.packing import Group
from basalt.data.preprocess import IGNORE, Tokenizer
from basalt.model.multimodal_llama import MultimodalLlama

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """A held-out question.

    Attributes:
        ids: the prompt, image tokens included.
        features: of its images, `[images, tokens, tower_dim]`, or None without any.
        end: the token that ends an answer.
    """

    ids: list[int]
    features: Tensor | None
    question: str
    expected: str
    end: int


def sample_of(group: Group, features: list[Tensor], tokenizer: Tokenizer) -> Sample:
    """The first question of a group, and its answer."""
    branch = group.branches[0]
    first = next(i for i, label in enumerate(branch.labels) if label != IGNORE)
    after = next((i for i, label in enumerate(branch.labels) if i > first and label == IGNORE), len(branch.labels))
    ids = [*group.prefix, *branch.ids[:first]]
    answer = list(branch.ids[first:after])

    def text(tokens: list[int]) -> str:
        return tokenizer.tokenizer.batch_decode([tokens], skip_special_tokens=True)[0].strip()

    question = text([token for token in ids if token != tokenizer.image_token_id])
    return Sample(ids, torch.stack(features) if features else None, question, text(answer), answer[-1])


def answers(
    samples: list[Sample], model: MultimodalLlama, standardizer: torch.nn.Module, tokenizer: Tokenizer
) -> list[dict[str, str]]:
    """`question`, `answer` and what was `expected`, greedy."""
    told = []
    training = model.lm.training
    model.lm.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
        for sample in samples:
            device = next(model.projector.parameters()).device
            ids = torch.tensor([sample.ids], device=device)
            visual = None if sample.features is None else model.project(standardizer(sample.features.to(device)))
            options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
            new = model.generate(
                ids, torch.ones_like(ids), visual, eos_token_id=sample.end, pad_token_id=sample.end, **options
            )
            [answer] = tokenizer.tokenizer.batch_decode(new, skip_special_tokens=True)
            told.append({"question": sample.question, "answer": answer.strip(), "expected": sample.expected})
    model.lm.train(training)
    return told
