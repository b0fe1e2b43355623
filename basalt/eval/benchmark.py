"""What the benchmarks have in common: samples to ask, rules that read answers, and the verdicts they give.

Each benchmark has a module that reads its published files into samples, says its prompt, and scores answers; the
table of them is in `basalt.eval.scoring`. Each answer gets two verdicts: `official`, as the
benchmark's own script has it, quirks included, so that numbers compare with papers; and `strict`, where only an
unambiguous answer counts, however it is written. Every verdict names the rule that decided it.
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

OFFICIAL, STRICT = "official", "strict"

Kind = Literal["read", "fallback", "failure", "refusal"]
ReadImage = Callable[[], bytes]


@dataclass(frozen=True)
class Rule:
    """One way in which an answer is read or fails to be. A `fallback` is a lucky one: a draw, or a chance match."""

    name: str
    kind: Kind
    meaning: str


class Reading(NamedTuple):
    """What an answer was understood to say ("" where nothing was), and by which rule."""

    answer: str
    rule: Rule


@dataclass(frozen=True)
class Verdict:
    """The share of a point, 0 to 1, that an answer earned (of a caption its CIDEr-D), and by which rule."""

    score: float
    rule: Rule
    answer: str = ""


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    `prompt` is the official text of the one user turn; the `images` come before it, in order. `gold` are the
    accepted answers, none where the split has no labels. `groups` says where the sample counts, as in
    `{"subject": ("Math",)}`. Samples about the same picture share a `cluster`: their errors are not independent.
    """

    id: str
    prompt: str
    gold: tuple[str, ...]
    options: tuple[str, ...] = ()
    images: tuple[ReadImage, ...] = field(default=(), compare=False, repr=False)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    cluster: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """The question as OpenAI chat messages, the images in data URLs.

        Raises:
            DataError: an image cannot be read.
        """
        shown = [{"type": "image_url", "image_url": {"url": _data_url(read())}} for read in self.images]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": self.prompt}]}]


@dataclass(frozen=True)
class Scored:
    """One sample with what was answered (`None`: nothing) and a verdict of each way of scoring."""

    sample: Sample
    prediction: Any
    verdicts: Mapping[str, Verdict]

    @property
    def difference(self) -> tuple[str, str] | None:
        """The rules by which official and strict came to different scores; `None` where they agree."""
        if OFFICIAL not in self.verdicts:
            return None
        official, strict = self.verdicts[OFFICIAL], self.verdicts[STRICT]
        return None if official.score == strict.score else (official.rule.name, strict.rule.name)


@dataclass(frozen=True)
class Metric:
    """A score as a function of sums over samples, so that it can be had of any draw of them.

    Attributes:
        name: of the figure in what the benchmark measures.
        terms: of scored samples, by one way of scoring, what is summed: [samples, terms].
        of: the score in percent of such sums: [..., terms] to [...].
        mean: whether it is the plain mean of the samples' scores.
    """

    name: str
    terms: Callable[[Sequence[Scored], str], NDArray[np.float64]]
    of: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    mean: bool = False


def mean_metric(name: str) -> Metric:
    """The plain mean of the samples' scores."""

    def terms(scored: Sequence[Scored], way: str) -> NDArray[np.float64]:
        return np.array([(one.verdicts[way].score, 1.0) for one in scored]).reshape(-1, 2)

    return Metric(name, terms, lambda sums: 100 * share(sums[..., 0], sums[..., 1]), mean=True)


def share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part by whole; 0 where the whole is."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole != 0)


ACCURACY = mean_metric("accuracy")

EMPTY = Rule("empty", "failure", "the answer is empty")
REFUSAL = Rule("refusal", "refusal", "the answer declines the question")
MISSING = Rule("missing", "failure", "the sample was not answered: it counts as wrong")

_REFUSAL = re.compile(
    r"\W*(?:i['’]?m sorry|i am sorry|sorry\b|(?:i|we) apologi[sz]e|unfortunately, i\b|as an? ai\b|as a language model"
    r"|i (?:can ?not|can['’]t|could not|couldn['’]t|am (?:unable|not able)|do not have|don['’]t have)\b"
    r"|i['’]m (?:unable|not able)\b)",
    re.IGNORECASE,
)


def no_answer(text: str) -> Rule | None:
    """The rule for an answer in which nothing was found, if it is empty or a refusal."""
    if not text.strip():
        return EMPTY
    return REFUSAL if _REFUSAL.match(text) else None


def accuracy(scored: Sequence[Scored], way: str) -> dict[str, float]:
    """The mean score of the samples: every sample counts the same, whatever its group."""
    return {"accuracy": 100 * mean(one.verdicts[way].score for one in scored)}


def mean(values: Iterable[float]) -> float:
    """The mean; 0 of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def by_group(scored: Iterable[Scored], kind: str) -> dict[str, list[Scored]]:
    """The samples of each group of a kind, in the order met; a sample may be in several, or in none."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        for name in one.sample.groups.get(kind, ()):
            groups.setdefault(name, []).append(one)
    return groups


def _data_url(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        kind = image.get_format_mimetype() or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
