"""Measures an assistant in this process, with no service between: captions, drawn scenes, and its chat."""

import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel

from basalt.data.images import decode_image
from basalt.data.preprocess import IGNORE
from basalt.data.readers import ImageSource, Row, read_records, read_rows
from basalt.eval.captions import bleu, cider
from basalt.eval.scenes import Score, score
from basalt.model.assistant import LocalAssistant

BATCH = 32

T = TypeVar("T")


def caption_scores(
    assistant: LocalAssistant, rows: Path, images: Path, *, beams: int = 1, limit: int | None = None
) -> dict[str, float]:
    """CIDEr-D and BLEU-4 of answers to "Describe the image." against all reference captions; greedy with one beam."""
    records = spread(list(read_records(rows)), limit)
    references = {record["image"]: record["captions"] for record in records}
    names = list(references)
    questions = [(name, "Describe the image.") for name in names]
    answers = _ask(assistant, ImageSource(images), questions, max_new_tokens=32, num_beams=beams)
    candidates = dict(zip(names, answers, strict=True))
    return {"cider": cider(candidates, references), "bleu_4": bleu(candidates, references)[3]}


def scene_scores(
    assistant: LocalAssistant, scenes: Path, *, limit: int | None = None
) -> tuple[dict[str, Score], list[tuple[dict[str, Any], str]]]:
    """Scores by kind of question, and every row with its answer."""
    every = [row for row in read_records(scenes / "scenes.json") if row["kind"] != "caption"]
    rows = spread(every, limit)
    questions = [(row["image"], row["conversations"][0]["value"].removeprefix("<image>\n")) for row in rows]
    answers = _ask(assistant, ImageSource(scenes), questions, max_new_tokens=16)
    return score(rows, answers), list(zip(rows, answers, strict=True))


@torch.inference_mode()
def perplexity_ratio(assistant: LocalAssistant, rows: Path, *, limit: int | None = None) -> float:
    """Perplexity on the answers of text-only chat, with the LoRA over without it; 1.0 is an unharmed LM."""
    lm = assistant.model.lm
    chats = [row for row in read_rows(rows) if isinstance(row, Row)]
    samples = [assistant.tokenizer.sample(row.messages) for row in spread(chats, limit)]

    def perplexity() -> float:
        total, count = 0.0, 0
        for sample in samples:
            ids, labels = torch.tensor([sample.ids]), torch.tensor([sample.labels])
            _, loss = assistant.model(ids, torch.ones_like(ids), labels=labels)
            learned = sum(label != IGNORE for label in sample.labels)
            total, count = total + float(loss) * learned, count + learned
        return math.exp(total / count)

    ours = perplexity()
    if not isinstance(lm, PeftModel):
        return 1.0
    with lm.disable_adapter():
        return ours / perplexity()


def spread(rows: list[T], limit: int | None) -> list[T]:
    """At most `limit` of the rows, from all over them."""
    return rows if limit is None or limit >= len(rows) else [rows[i * len(rows) // limit] for i in range(limit)]


def _ask(assistant: LocalAssistant, images: ImageSource, questions: list[tuple[str, str]], **options: Any) -> list[str]:
    """Answers to (image name, question), in order; batches hold questions of like length."""
    order = sorted(range(len(questions)), key=lambda index: len(questions[index][1]))
    answers = [""] * len(questions)
    for start in range(0, len(order), BATCH):
        members = order[start : start + BATCH]
        conversations = [
            (
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[index][1]}]}],
                [decode_image(images.read(questions[index][0]))],
            )
            for index in members
        ]
        for index, answer in zip(members, assistant.answer(conversations, **options), strict=True):
            answers[index] = answer
    return answers
