"""Answers that no parser may stumble over: changed copies of what models really say, and plain rubbish."""

import random
from collections.abc import Iterator

SAID = [
    "A", "B", "C)", "(D)", "**B**", "b", "B. blue", "(A) a red car\n(B) a blue car", "The answer is C.",
    "Answer: (B)", "The correct option is D because it is blue", "I think it is A or B", "E", "Z", "option b",
    "Yes", "No", "yes, there is a dog", "No.", "NO", "nope", "not at all", "Yes and no", "There is no dog.", "\nNo",
    "42", "The total is $1,234.50", "3 or 4 or 5", "x = 0.015625", "10%", "1/64", "-3.5e-7", "So the result is 7",
    "therefore 12.0", "final answer: 8", "= 3", "1e400", "−5", "nan", "inf", "0x1F", "1_000", "٣", "½", "10^3", "1,2",
    "none", "N/A", "dakota digital", "don't walk", "couldnt", "the sign says 'stop'", "St. James's", "two", "7:30 p.m.",
    "I'm sorry, I can't see the image", "As an AI language model I cannot answer", "Unfortunately, I do not know",
    "0.5", "0.5 because most is right", "1.0", "-1", "2", "Grade: 0.7", "I give it 0.8", "1e-1", "",
]  # fmt: skip
PIECES = [
    " ", "  ", "\n", "\t", "\r\n", ".", ",", "?", "!", ":", ";", "'", '"', "(", ")", "[", "]", "{", "}", "*", "**", "_",
    "`", "$", "%", "-", "/", "=", "|", "\\", "<", ">", "\x00", "\u200b", "\u2028", "\xa0", "\ufeff", "\ud800", "ß", "İ",
    "ſ", "K", "é", "日本", "🦜", "́", "A", "B", "(A)", " is ", " the ", "answer", "The answer is A.", "no", "yes",
    "1", "0", "9" * 400, "1e9", "e", ",000", "so ", "'s", "a" * 3000, "( " * 400, "is " * 400, "1," * 400, "." * 400,
]  # fmt: skip


def strange_answers(count: int = 20_000, seed: int = 1) -> Iterator[str]:
    """The same answers for the same seed: those said, then mutations of them."""
    draw = random.Random(seed)
    yield from SAID
    for _ in range(count - len(SAID)):
        text = draw.choice(SAID)
        for _ in range(draw.randint(1, 5)):
            text = _mutated(text, draw)
        yield text


def _mutated(text: str, draw: random.Random) -> str:
    at, to = sorted(draw.randint(0, len(text)) for _ in range(2))
    match draw.randrange(7):
        case 0:
            return text[:at] + text[to:]
        case 1:
            return text[:at] + chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xD800)])) + text[at:]
        case 2:
            return text.swapcase()
        case 3:
            return draw.choice(SAID) + draw.choice(PIECES) + text
        case 4:
            return text[to:] + text[at:to] + text[:at]
        case _:
            return text[:at] + draw.choice(PIECES) + text[at:]
