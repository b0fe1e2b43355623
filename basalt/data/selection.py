"""Which rows of a data set are learned from: those that are not are counted, and too many of them stop a run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from basalt.data.preprocess import IGNORE, Sample
from basalt.data.readers import DataError, Row, Unusable

MAX_DROPPED = 0.05  # a data set that loses more than this share of its rows is not what its owner thinks it is
MAX_UNLABELLED = 0.01  # nor is a chat template, where this share of rows has nothing it marks as an answer
UNLABELLED = "no label: the chat template leaves nothing to learn"
TOO_LONG = "longer than row_length"
BROKEN = "an image is missing or cannot be decoded"
EXAMPLES = 3

Samples = list[tuple[Row, Sample]]


@dataclass
class Dropped:
    """The rows dropped for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)  # the first few


class Counts:
    """How many rows a data set has, and how many were dropped by which reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.dropped: dict[str, Dropped] = {}

    def drop(self, reason: str, where: str, found: str) -> None:
        dropped = self.dropped.setdefault(reason, Dropped())
        dropped.count += 1
        if len(dropped.examples) < EXAMPLES:
            dropped.examples.append(f"{where}: {found}")

    def count(self, reason: str) -> int:
        return self.dropped[reason].count if reason in self.dropped else 0

    @property
    def lost(self) -> int:
        return sum(dropped.count for dropped in self.dropped.values())

    def problem(self) -> str | None:
        """Why this data set cannot be trained on; None where it can."""
        if not self.rows:
            return f"{self.path} holds no rows"
        if self.count(UNLABELLED) > MAX_UNLABELLED * self.rows:
            limit = f"at most {MAX_UNLABELLED:.0%} may be without a label"
        elif self.lost > MAX_DROPPED * self.rows:
            limit = f"at most {MAX_DROPPED:.0%} may be dropped"
        else:
            return None
        return f"{self.path}: of {self.rows} rows, {self}; {limit}"

    def check(self) -> None:
        """Raises DataError where there is a problem."""
        problem = self.problem()
        if problem is not None:
            raise DataError(problem)

    def __str__(self) -> str:
        """`3 dropped: 2 × not JSON (line 7: …), 1 × …`"""
        reasons = (f"{lost.count} × {reason} ({lost.examples[0]})" for reason, lost in self.dropped.items())
        return f"{self.lost} dropped: {', '.join(reasons)}" if self.dropped else "none dropped"


def usable(found: Iterable[Row | Unusable], counts: Counts) -> list[Row]:
    """The rows among what was read."""
    rows: list[Row] = []
    for row in found:
        counts.rows += 1
        if isinstance(row, Row):
            rows.append(row)
        else:
            counts.drop(row.reason, row.where, row.found)
    return rows


def learnable(samples: Iterable[tuple[Row, Sample]], row_length: int, counts: Counts) -> Samples:
    """Those that have a label and are at most `row_length` tokens long. None is cut: see `group_samples`."""
    kept: Samples = []
    for row, sample in samples:
        if len(sample.ids) > row_length:
            counts.drop(TOO_LONG, row.where, f"{len(sample.ids)} tokens, row_length is {row_length}")
        elif all(label == IGNORE for label in sample.labels):
            counts.drop(UNLABELLED, row.where, f"{len(sample.ids)} tokens")
        else:
            kept.append((row, sample))
    return kept


def with_images(samples: Samples, broken: Mapping[str, str], counts: Counts) -> Samples:
    """Those whose images are all there. `broken`: image name → why it is not."""
    kept: Samples = []
    for row, sample in samples:
        missing = next((name for name in row.images if name in broken), None)
        if missing is None:
            kept.append((row, sample))
        else:
            counts.drop(BROKEN, row.where, f"{missing}: {broken[missing]}")
    return kept
