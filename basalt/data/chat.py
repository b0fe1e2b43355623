"""Text-only conversations in which the base LM answers for itself, so that an assistant still talks as it did.

Instruction tuning on pictures alone makes a small LM forget how to chat. Its own answers, mixed in, hold it
in place (self-distillation), and no foreign text comes into the training.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from basalt.model.precision import dtype_of

TEMPLATES: dict[str, tuple[str, ...]] = {
    "country": ("What is the capital of {}?", "Which language is spoken in {}?", "Tell me one fact about {}.",
                "On which continent is {}?"),
    "topic": ("Explain {} in one sentence.", "What is {}?", "Why is {} important?", "Write two sentences about {}.",
              "Give me three facts about {}.", "How would you explain {} to a child?", "Write a short poem about {}."),
    "task": ("How do I {}?", "Give me a tip to {}.", "What do I need to {}?", "List three steps to {}."),
    "animal": ("What does a {} eat?", "Where do {}s live?", "Write one sentence about a {}.", "Is a {} dangerous?"),
    "sum": ("What is {}?", "Calculate {}."),
    "word": ("What is the opposite of {}?", "Use the word {} in a sentence.", "What does {} mean?",
             "Give me a synonym for {}."),
    "greeting": ("{}", "{} Who are you?", "{} What can you do?", "{} How are you today?"),
}  # fmt: skip

FILLINGS: dict[str, list[str]] = {
    "country": [
        "Germany", "Italy", "Spain", "Portugal", "Poland", "Sweden", "Norway", "Finland", "Denmark", "Greece",
        "Turkey", "Egypt", "Morocco", "Kenya", "Nigeria", "Ghana", "India", "China", "Japan", "Thailand",
        "Vietnam", "Indonesia", "Australia", "Canada", "Mexico", "Brazil", "Argentina", "Chile", "Peru",
        "Cuba", "Ireland", "Iceland", "Austria", "Hungary", "Romania", "Ukraine", "Israel", "Iran", "Nepal",
        "Mongolia",
    ],
    "topic": [
        "gravity", "photosynthesis", "democracy", "inflation", "electricity", "evolution", "friendship",
        "music", "algebra", "geometry", "rain", "snow", "volcanoes", "earthquakes", "vaccines", "bacteria",
        "atoms", "magnets", "energy", "sleep", "exercise", "history", "poetry", "football", "chess",
        "cooking", "coffee", "bread", "trains", "bridges", "computers", "software", "the internet", "robots",
        "recycling", "forests", "oceans", "deserts", "the moon", "the sun", "stars", "planets", "dinosaurs",
        "the heart", "the brain", "language", "money", "law", "art", "painting",
    ],
    "task": [
        "bake bread", "learn to swim", "write a letter", "plant a tree", "clean a window", "make tea",
        "sleep better", "save money", "study for an exam", "fix a flat tire", "cook rice", "train a dog",
        "learn a language", "start a garden", "prepare for an interview", "boil an egg", "make new friends",
        "read more books", "stay healthy", "ride a bicycle", "paint a wall", "pack a suitcase",
        "write a poem", "run faster",
    ],
    "animal": [
        "dog", "cat", "horse", "cow", "lion", "tiger", "bear", "wolf", "fox", "rabbit", "elephant", "giraffe",
        "zebra", "monkey", "dolphin", "whale", "shark", "eagle", "owl", "penguin", "duck", "chicken", "frog",
        "snake", "turtle", "spider", "bee", "butterfly",
    ],
    "sum": [f"{a} {sign} {b}" for a in range(2, 20, 3) for b in range(2, 12, 3) for sign in ("+", "-", "times")],
    "word": [
        "happy", "cold", "big", "fast", "strong", "early", "rich", "dark", "quiet", "brave", "honest",
        "simple", "hungry", "bright", "ancient", "gentle", "rare", "smooth", "sharp", "empty", "clean",
        "heavy",
    ],
    "greeting": [
        "Hello!", "Hi there.", "Good morning!", "Hey,", "Good evening.", "Hello, assistant.",
    ],
}  # fmt: skip


def chat_prompts(seed: int = 0) -> list[str]:
    """Every prompt, shuffled; the same seed gives the same order."""
    prompts = [
        template.format(filling)
        for kind, templates in TEMPLATES.items()
        for template in templates
        for filling in FILLINGS[kind]
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


@torch.inference_mode()
def answer_prompts(base_lm: Path, prompts: list[str], out: Path, *, max_new_tokens: int = 80, batch: int = 48) -> int:
    """Lets the base LM answer with its own chat template, greedily, and writes LLaVA JSON without images.

    Answers that reach the limit are cut back to their last whole sentence, or left out if they have none.

    Returns:
        The number of rows written.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_lm, padding_side="left")
    lm: Any = AutoModelForCausalLM.from_pretrained(base_lm, dtype=dtype_of("auto", torch.device("cpu"))).eval()
    rows = []
    for start in range(0, len(prompts), batch):
        asked = prompts[start : start + batch]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in asked],
            add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True,
        )  # fmt: skip
        new = lm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.05)
        for prompt, tokens in zip(asked, new[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            if tokenizer.eos_token_id not in tokens:
                text = text[: max(text.rfind(mark) for mark in ".!?") + 1]
            if text:
                turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": text}]
                rows.append({"id": f"chat-{len(rows)}", "conversations": turns})
    out.write_text(json.dumps(rows))
    return len(rows)
