"""Reads which option of a multiple-choice question an answer names, strictly: it must name one, and no other."""

import re
import string
from collections.abc import Sequence

from basalt.eval.benchmark import EMPTY, Reading, Rule, no_answer

LETTERS = string.ascii_uppercase

LETTER = Rule("letter", "read", "the answer is one letter, whatever brackets or marks stand round it")
STATED = Rule("letter stated", "read", "one letter is called the answer, the option or the choice")
LEADING = Rule("letter in front", "read", "one letter leads the answer ('B. blue', '(B) blue') and no other is marked")
BRACKETED = Rule("letter in brackets", "read", "one letter stands in brackets in the answer")
OPTION = Rule("option's text", "read", "the answer is the text of one option and nothing else")
AMBIGUOUS = Rule("ambiguous", "failure", "the answer names several options")
OUTSIDE = Rule("no such option", "failure", "the answer names a letter that no option has")
UNREADABLE = Rule("unreadable", "failure", "the answer names no option")

_MARKUP = re.compile(r"[*_`]+")
_LETTER = re.compile(r"(?:option|choice)?[^\w+#-]*([a-z])[^\w+#-]*", re.IGNORECASE)  # "C#" and "A+" are no letters
_LEADING = re.compile(r"^(?:[(\[]([A-Z])[)\]]|([A-Z])[.):](?=\s|$))", re.MULTILINE)
# "The answer is A dog" and "I" the pronoun are words: those two letters need something after them that ends a phrase.
_STATED = re.compile(
    r"\b(?:(?i:answer|option|choice)(?:\s+is)?\s*:?\s+|(?i:answer\s+is|answer:)\s*)(?:(?i:option|choice)\s+)?"
    r"[(\[]?(?:([B-HJ-Z])\b|([AI])(?=[)\].,:;!?]|\s*$))",
    re.MULTILINE,
)
_BRACKETED = re.compile(r"\(([A-Z])\)")


def read_letter(response: str, options: Sequence[str]) -> Reading:
    """The capital letter of the one option that the response names, "" if it does not name exactly one.

    These rules are the project's own; the benchmarks' official ones are in their modules.
    """
    # Without runs of blanks: the patterns take quadratic time on those.
    text = "\n".join(" ".join(line.split()) for line in _MARKUP.sub("", response).splitlines() if line.strip())
    if not text:
        return Reading("", EMPTY)
    if alone := _LETTER.fullmatch(text):
        return _one({alone[1].upper()}, options, LETTER)
    if stated := {found[1] or found[2] for found in _STATED.finditer(text)}:
        return _one(stated, options, STATED)
    leading = {found[1] or found[2] for found in _LEADING.finditer(text)}
    if named := leading | set(_BRACKETED.findall(text)):
        return _one(named, options, LEADING if leading else BRACKETED)
    if same := {letter for letter, option in zip(LETTERS, options, strict=False) if _plain(option) == _plain(text)}:
        return _one(same, options, OPTION)
    return Reading("", no_answer(text) or UNREADABLE)


def _one(letters: set[str], options: Sequence[str], rule: Rule) -> Reading:
    if len(letters) > 1:
        return Reading("", AMBIGUOUS)
    (letter,) = letters
    return Reading(letter, rule) if letter in LETTERS[: len(options)] else Reading("", OUTSIDE)


def _plain(text: str) -> str:
    """Case, runs of blanks, and what stands round the text set aside."""
    return " ".join(_MARKUP.sub("", text).casefold().split()).strip(" .,:;!?'\"")
