"""MMMU: college-level questions of 30 subjects, with pictures in question and options (Yue et al. 2023).

Official are the prompt (`configs/llava1.5.yaml`) and the rules (`utils/eval_utils.py`) of the benchmark's own
repository, quirks included. The overall score is the mean over samples, whatever their subject.
"""

import ast
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from basalt.data.readers import DataError
from basalt.eval.benchmark import EMPTY, OFFICIAL, STRICT, Reading, Rule, Sample, Verdict, no_answer
from basalt.eval.letters import LETTERS, read_letter
from basalt.eval.records import checked, read_parquet

SUBJECTS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
DISCIPLINE = {subject: discipline for discipline, subjects in SUBJECTS.items() for subject in subjects}
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
CHOICE, OPEN = "multiple-choice", "open"

# Multiple choice, official.
BRACKETS = Rule("(A)", "read", "one option's letter stands in brackets")
SPACED = Rule("A between blanks", "read", "one option's letter stands between blanks, be it the article 'A'")
CONTENT = Rule("text of an option", "fallback", "more than five words, and one option's text is part of them")
LAST_BRACKETS = Rule("last (A)", "fallback", "of several letters in brackets, the last")
LAST_SPACED = Rule("last A between blanks", "fallback", "of several letters between blanks, the last")
LAST_CONTENT = Rule("last text of an option", "fallback", "of several options' texts, the one that stands last")
DRAWN = Rule("drawn", "fallback", "no rule found an option: one was drawn at random")

# Open questions, official.
NUMBER = Rule("number", "read", "the one number of the answer is the gold one to two decimals")
ONE_OF_NUMBERS = Rule("one of several numbers", "fallback", "one of several numbers is the gold one to two decimals")
EQUAL = Rule("equal text", "read", "the answer, or what follows a word like 'is', is the gold text")
PART = Rule("part of the text", "fallback", "the gold text is part of the answer, be it of a longer word")
NO_MATCH = Rule("no match", "read", "the answer matches no gold answer")

# Open questions, strict.
CLAIM = Rule("claimed", "read", "the answer, or what it calls the answer, is one text or number: right if a gold one")
SEVERAL = Rule("several numbers", "failure", "the answer gives several numbers and calls none the answer")

_IMAGE = re.compile(r"<image (\d+)>")
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
# Numbers as the original finds them: with commas, scientific, plain. "10^3" and "1,2" are as odd there. That none
# begins or ends within a run of digits changes nothing that is found, and keeps long runs from taking quadratic time.
_NUMBERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"-?\b\d{1,3}(?:,\d{3})+\b",
        r"-?(?<!\d)\d++(?:\.\d++)?+[eE][+-]?\d+",
        r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])",
    )
)
_CLAIM = re.compile(r".*\banswer(?:\s+is\b|\s*[:=])\s*(.*)", re.DOTALL)
_NUMBER = re.compile(r"[-−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)


def read_samples(path: Path, images: Path | None = None) -> list[Sample]:
    """The samples of a parquet file with the official columns, or of a folder with `validation*.parquet` below it.

    Pictures are in the files, so `images` is not needed. All that question and options name as `<image N>` come
    before the text, in the order of their numbers; LLaVA's own run showed the first alone. The test split has no
    labels (its answers are "?").

    Raises:
        DataError: a record is not as published.
    """
    files = sorted(path.rglob("validation*.parquet")) if path.is_dir() else [path]
    columns = ["id", "question", "options", "answer", "question_type"]
    rows = [
        (row, f"{file}, row {number}")
        for file in files
        for number, row in enumerate(read_parquet(file, columns, IMAGES))
    ]
    return checked([_sample(row, where) for row, where in rows], path)


def prompt(question: str, options: Sequence[str]) -> str:
    """The official prompt; no options: an open question. YAML folds the configuration's blank lines to one break."""
    if not options:
        return f"{question}\nAnswer the question using a single word or phrase."
    listed = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\n{listed}\nAnswer with the option's letter from the given choices directly."


def read_choice(response: str, options: Sequence[str], draw: random.Random) -> Reading:
    """The option's letter, by the official `parse_multi_choice_response`.

    So "B)", "**B**", "B: $7", "option b" and "" are drawn. `draw` is used for that alone.
    """
    for mark in ",.!?;:'":  # one after the other: "B.," loses both, "B,." only the dot
        response = response.strip(mark)
    text = f" {response} "
    letters = LETTERS[: len(options)]
    texts = {letter: option.lower() for letter, option in zip(letters, options, strict=True)}
    lower = text.lower()
    tries = [
        ({letter: text.rfind(f"({letter})") for letter in letters}, BRACKETS, LAST_BRACKETS),
        ({letter: text.rfind(f" {letter} ") for letter in letters}, SPACED, LAST_SPACED),
    ]
    if len(text.split()) > 5:
        tries.append(({letter: lower.rfind(texts[letter]) for letter in letters}, CONTENT, LAST_CONTENT))
    for places, one, several in tries:
        found = [letter for letter in letters if places[letter] >= 0]
        if found:
            return Reading(max(found, key=places.__getitem__), one if len(found) == 1 else several)
    return Reading(draw.choice(letters), DRAWN)


def read_open(response: str) -> list[str | float]:
    """What an open answer may be taken to say, by the official `parse_open_response`: texts and numbers.

    The original means to cut it into sentences too, but looks for their capitals after making them small.
    """
    whole = response.strip().strip(".").lower()
    lines = whole.split("\n")
    parts = []
    for number, line in enumerate(lines):
        shortest = ""
        for key in (*_KEYS, "=") if number == len(lines) - 1 else _KEYS:
            tail = line.split(key)[-1].strip()
            if key in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    parts = parts or [whole]
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return [value for text in (*parts, *numbers) for value in _normal(text)]


def score(sample: Sample, prediction: str) -> dict[str, Verdict]:
    """A point for the right option or answer, by each way of reading.

    Where the official way draws, the draw depends on the sample's id alone: scoring again gives the same.
    """
    if not sample.options:
        return {OFFICIAL: _score_open(prediction, sample.gold), STRICT: _score_claim(prediction, sample.gold)}
    readings = {
        OFFICIAL: read_choice(prediction, sample.options, random.Random(sample.id)),
        STRICT: read_letter(prediction, sample.options),
    }
    return {
        way: Verdict(float(reading.answer in sample.gold), reading.rule, reading.answer)
        for way, reading in readings.items()
    }


def _score_open(response: str, gold: Sequence[str]) -> Verdict:
    """The official `eval_open`: a gold text within a text, or a gold number among the numbers."""
    candidates = read_open(response)
    wanted = [value for text in gold for value in _normal(text)]
    texts = [value for value in candidates if isinstance(value, str)]
    numbers = [value for value in candidates if isinstance(value, float)]
    wanted_texts = [value for value in wanted if isinstance(value, str)]
    answer = " | ".join(map(str, dict.fromkeys(candidates)))
    if right := [number for number in numbers if number in wanted]:
        return Verdict(1.0, NUMBER if set(numbers) == set(right) else ONE_OF_NUMBERS, answer)
    if right := [text for text in texts if any(value in text for value in wanted_texts)]:
        equal = {text.strip() for text in right} & {value.strip() for value in wanted_texts}
        return Verdict(1.0, EQUAL if equal else PART, answer)
    return Verdict(0.0, NO_MATCH, answer)


def _normal(text: str) -> list[str | float]:
    """A number to two decimals, else the text in small letters; one letter alone only beside a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _score_claim(response: str, gold: Sequence[str]) -> Verdict:
    """Strict: the answer, or what it calls the answer, must be a gold text, or hold one number, and that a gold one."""
    if not response.strip():
        return Verdict(0.0, EMPTY)
    text = _plain(response)
    claim = _plain(found[1]) if (found := _CLAIM.fullmatch(text)) else text
    if claim in {_plain(value) for value in gold}:
        return Verdict(1.0, CLAIM, claim)
    numbers = {value for found in _NUMBER.findall(claim) if (value := _number(found)) is not None}
    wanted = {value for text in gold if (value := _number(text)) is not None}
    if wanted and len(numbers) > 1:
        return Verdict(0.0, SEVERAL, claim)
    if wanted and numbers:
        return Verdict(float(numbers <= wanted), CLAIM, claim)
    return Verdict(0.0, no_answer(response) or CLAIM, claim)


def _plain(text: str) -> str:
    """Case, dollar signs, runs of blanks, a leading article, and what stands round the text set aside."""
    text = " ".join(text.replace("$", " ").replace("*", " ").casefold().split()).strip(" .,:;!?'\"")
    return re.sub(r"^(?:an?|the) (?=.)", "", text)


def _number(text: str) -> float | None:
    """A number to two decimals, as the official rules compare them."""
    try:
        return round(float(text.replace(",", "").replace("−", "-")), 2)
    except ValueError:
        return None


def _sample(row: dict[str, Any], where: str) -> Sample:
    subject = "_".join(str(row["id"]).split("_")[1:-1])
    if subject not in DISCIPLINE:
        raise DataError(f"{where}: an id is SPLIT_SUBJECT_NUMBER with one of the 30 subjects, found {row['id']!r}")
    kind, options, answer = row["question_type"], _literal(row["options"], where), row["answer"]
    if kind not in (CHOICE, OPEN):
        raise DataError(f"{where}: the question type must be {CHOICE!r} or {OPEN!r}, found {kind!r}")
    if not isinstance(options, list) or (kind == CHOICE) != bool(options):
        raise DataError(f"{where}: {kind!r} with the options {options!r}")
    # That letter may be beyond the options: of the published validation_Geography_15 it is D of three.
    if kind == CHOICE and answer != "?" and (len(answer) != 1 or answer not in LETTERS):
        raise DataError(f"{where}: the answer to a multiple-choice question is a letter, found {answer!r}")
    several = kind == OPEN and answer.startswith("[")  # a list, made text where the column is one of texts
    gold = _literal(answer, where) if several else [] if answer == "?" else [answer]
    named = {int(number) for number in _IMAGE.findall(" ".join([row["question"], *options]))}
    columns = [f"image_{number}" for number in sorted(named)] or IMAGES[:1]
    if absent := [column for column in columns if row.get(column) is None]:
        raise DataError(f"{where}: names pictures that it has not: {', '.join(absent)}")
    return Sample(
        id=row["id"],
        prompt=prompt(row["question"], options),
        gold=tuple(gold),
        options=tuple(options),
        images=tuple(row[column] for column in columns),
        groups={"discipline": (DISCIPLINE[subject],), "subject": (subject,), "question type": (kind,)},
        cluster=row["id"],
    )


def _literal(text: str, where: str) -> Any:
    """A Python literal, read without running it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise DataError(f"{where}: expected a list written as in Python, found {text!r}") from error
