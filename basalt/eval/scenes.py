"""Scores answers about the project's own drawn scenes, by kind of question.

It sees only the rows that `basalt.data.scenes.make_scenes` wrote and one answer each, whoever gave them. Every
rule reads free text: a whole sentence counts as much as a bare word. Descriptions and spelling are not scored.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from basalt.data.emoji import CATEGORY, plural
from basalt.data.scenes import COLOURS, NUMBERS, held_out_words

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution

NAMES: dict[str, tuple[str, ...]] = {
    "plane": ("airplane", "aeroplane", "aircraft", "jet"), "bicycle": ("bike",), "motorcycle": ("motorbike",),
    "car": ("automobile",), "truck": ("lorry",), "taxi": ("cab",), "boat": ("sailboat", "speedboat"),
    "television": ("tv",), "phone": ("telephone", "smartphone", "cellphone"), "sofa": ("couch",),
    "laptop": ("computer",),
    "donut": ("doughnut",), "fries": ("french fries",), "burger": ("hamburger", "cheeseburger"), "candy": ("sweet",),
    "ladybug": ("ladybird",), "rabbit": ("bunny",), "rhino": ("rhinoceros",), "hippo": ("hippopotamus",),
    "turtle": ("tortoise",), "dog": ("puppy",), "cat": ("kitten",), "horse": ("pony",), "eggplant": ("aubergine",),
    "pants": ("trousers", "jeans"), "handbag": ("purse", "bag"), "backpack": ("rucksack",), "gift": ("present",),
    "glasses": ("spectacles", "eyeglasses"), "shirt": ("t-shirt", "tshirt"),
    "globe": ("earth", "world"), "drum": ("drums",), "ship": ("cruise ship",), "watch": ("wristwatch",),
    "light bulb": ("lightbulb", "bulb"), "teddy bear": ("teddy",), "woman": ("lady",), "bucket": ("pail",),
    "diamond": ("gem", "rhombus"), "trophy": ("cup",), "spaghetti": ("pasta", "noodles"), "corn": ("maize",),
}  # fmt: skip

_NUMBER_WORDS = (*NUMBERS, "six", "seven", "eight", "nine", "ten")
_NUMBER = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {
    str(value): str(value) for value in range(100)
}
_COLOUR = {colour: colour for colour in (*COLOURS, "grey")} | {
    "gray": "grey", "violet": "purple", "magenta": "pink", "golden": "yellow",
}  # fmt: skip
_PLACE = {place: place for place in ("left", "right", "top", "bottom", "middle")} | {
    "center": "middle", "centre": "middle", "upper": "top", "above": "top", "lower": "bottom", "below": "bottom",
}  # fmt: skip
_YES_NO = {"yes": "yes", "yeah": "yes", "yep": "yes", "no": "no", "not": "no", "nope": "no"}


@dataclass(frozen=True)
class Score:
    """Share of right answers out of `count`, and its Wilson 95 % interval from `low` to `high`.

    For yes/no it is the balanced accuracy: the mean of the shares on "yes" rows and on "no" rows, so that
    always saying yes earns 0.5. Its interval joins the two Wilson intervals (Newcombe 1998, by their squared
    distances).
    """

    accuracy: float
    count: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}] of {self.count}"


def score(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> dict[str, Score]:
    """Scores one answer per row.

    Args:
        rows: of the scenes' JSON; `kind` and `gold` are read, and `spell` and `caption` rows passed over.

    Returns:
        Kind → score, for the kinds that occur: `what`, `count`, `colour`, `where`, `yesno`, `read`, `chart`, and
        `read_seen` and `read_unseen` for words that are and are not in the training scenes.

    Raises:
        ValueError: there are more or fewer answers than rows, or a row of an unknown kind.
    """
    if len(rows) != len(answers):
        raise ValueError(f"there are {len(answers)} answers for {len(rows)} rows")
    unseen = held_out_words()
    right: dict[str, list[bool]] = defaultdict(list)
    yes_no: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        kind, gold = row["kind"], row["gold"]
        if kind in ("caption", "spell"):
            continue
        if kind not in _RULES:
            raise ValueError(f"row {row.get('id')}: no rule for kind {kind!r}; known are {sorted(_RULES)}")
        is_right = _RULES[kind](answer, gold)
        right[kind].append(is_right)
        if kind == "yesno":
            yes_no[gold].append(is_right)
        elif kind == "read":
            right["read_unseen" if gold in unseen else "read_seen"].append(is_right)
    scores = {kind: _score(outcomes) for kind, outcomes in right.items()}
    if yes_no:
        scores["yesno"] = _balanced([_score(outcomes) for outcomes in yes_no.values()])
    return scores


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); `count` above 0."""
    share, spread = successes / count, Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _score(outcomes: list[bool]) -> Score:
    return Score(sum(outcomes) / len(outcomes), len(outcomes), *wilson(sum(outcomes), len(outcomes)))


def _balanced(classes: list[Score]) -> Score:
    mean = sum(part.accuracy for part in classes) / len(classes)
    below = math.hypot(*(part.accuracy - part.low for part in classes)) / len(classes)
    above = math.hypot(*(part.high - part.accuracy for part in classes)) / len(classes)
    return Score(mean, sum(part.count for part in classes), mean - below, mean + above)


def _first(names: dict[str, str]) -> Callable[[str, str], bool]:
    """A rule: of the words in `names`, the first one in the answer is the gold one."""
    words = re.compile(rf"\b(?:{'|'.join(names)})\b")

    def rule(answer: str, gold: str) -> bool:
        found = words.search(answer.lower())
        return found is not None and names[found[0]] == names[gold]

    return rule


def _names(answer: str, gold: str) -> bool:
    """The answer names the gold noun, in either number or by a synonym; "hot dog" does not name a dog."""
    wanted, others = _name_patterns(gold)
    text = answer.lower()
    return wanted.search(others.sub(" ", text) if others else text) is not None


@cache
def _name_patterns(gold: str) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    """What names the noun, and the other nouns of the scenes that hold its name and are to be set aside."""
    wanted = _forms(gold)
    names = _any_of(wanted)
    compounds = [noun for noun in CATEGORY if noun != gold and names.search(noun.lower())]
    others = {form for noun in compounds for form in _forms(noun)} - wanted
    return names, _any_of(others) if others else None


def _forms(noun: str) -> set[str]:
    """Lower-case singulars and plurals of a noun and its synonyms."""
    forms = {name.lower() for name in (noun, *NAMES.get(noun, ()))}
    forms |= {plural(form) for form in forms}
    for form in [form for form in forms if form.endswith("s") and not form.endswith("ss")]:  # "grapes", "cherries"
        forms.add(form[:-3] + "y" if form.endswith("ies") and form != "fries" else form[:-1])
    return forms


def _any_of(forms: set[str]) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, sorted(forms, key=len, reverse=True)))})(?![\w-])")


def _says(answer: str, gold: str) -> bool:
    return re.search(rf"\b{re.escape(gold)}\b", answer, re.IGNORECASE) is not None


_FIRST_NUMBER, _FIRST_COLOUR = _first(_NUMBER), _first(_COLOUR)

_RULES: dict[str, Callable[[str, str], bool]] = {
    "what": _names,
    "count": _FIRST_NUMBER,
    "colour": _FIRST_COLOUR,
    "where": _first(_PLACE),
    "yesno": _first(_YES_NO),
    "read": _says,
    "chart": lambda answer, gold: (_FIRST_NUMBER if gold in _NUMBER else _FIRST_COLOUR)(answer, gold),
}
