"""Whether an assistant was trained on what it is tested by: benchmark samples found again in training data.

A picture is the same by the digest of its bytes; it is alike where its perceptual hash (low frequencies of a discrete
cosine transform, Zauner 2010) and then its thumbnail come close: scaled, compressed or re-encoded copies do. A text is
found where 13 words in a row are the same, as for GPT-3 (Brown et al. 2020, appendix C). Runs of words that several
samples share are the benchmark's own phrases and tell nothing; a sample of fewer words cannot be told by its text.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from basalt.data.images import ImageError, decode_image
from basalt.data.readers import DataError, DataSet, Row
from basalt.eval.benchmark import Sample

WORDS = 13
SHARED = 5  # samples that may have a run of words before it is a phrase
BITS = 6  # of 64 that the hashes of like pictures may differ by
SHADES = 8.0  # of 255 that their thumbnails may differ by in the mean
FLAT = 4.0  # standard deviation of shades under which a picture has nothing to hash

_SIDE, _LOW, _THUMBNAIL = 32, 8, 16
_COSINES = np.cos(np.pi * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5) / _SIDE)

Kind = Literal["same image", "like image", "text"]


@dataclass(frozen=True)
class Found:
    """A sample that is in the training data: where there, and for a text the words, for an image how far apart."""

    sample: str
    kind: Kind
    where: str
    told: str


@dataclass
class Report:
    """What was compared and found. Sample ids in `short` had too few words to be told by their text."""

    samples: int
    rows: int = 0
    images: int = 0
    found: list[Found] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # pictures of either side that cannot be read

    @property
    def contaminated(self) -> set[str]:
        """The ids of samples found in any way."""
        return {one.sample for one in self.found}

    def as_json(self) -> dict[str, Any]:
        kinds = {kind: len({one.sample for one in self.found if one.kind == kind}) for kind in Kind.__args__}
        return {
            "samples": self.samples,
            "training_rows": self.rows,
            "training_images": self.images,
            "contaminated": len(self.contaminated),
            "by_kind": kinds,
            "too_short_for_text": len(self.short),
            "unreadable_images": self.unread,
            "found": [asdict(one) for one in self.found],
        }


@dataclass(frozen=True)
class Look:
    """What a picture is compared by. `hash` is of 64 bits; none of a picture without any structure."""

    digest: str
    hash: int | None
    thumbnail: NDArray[np.uint8]  # [16 × 16]


def check(samples: Sequence[Sample], training: Iterable[tuple[str, DataSet]]) -> Report:
    """Looks for the samples in data sets, each with the name it is told by. Pictures are read once each.

    Raises:
        DataError: a data set is not what it says.
    """
    report = Report(len(samples))
    texts, pictures = _Texts(samples, report), _Pictures(samples, report)
    for name, data in training:
        seen: set[str] = set()
        for row in data.rows():
            if not isinstance(row, Row):
                continue
            report.rows += 1
            where = f"{name}, {row.where}"
            texts.look(row, where)
            for image in row.images:
                if image not in seen:
                    seen.add(image)
                    report.images += 1
                    pictures.look(data, image, where)
    return report


def look_at(data: bytes) -> Look:
    """
    Raises:
        ImageError: it is no picture.
    """
    grey = decode_image(data).convert("L")
    small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_COSINES @ small @ _COSINES.T).ravel()
    bits = low > np.median(low[1:])  # the first is the mean shade
    hashed = int.from_bytes(np.packbits(bits).tobytes(), "big") if small.std() >= FLAT else None
    thumbnail = np.asarray(grey.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX))
    return Look(f"sha256:{hashlib.sha256(data).hexdigest()}", hashed, thumbnail)


class _Texts:
    """The samples' runs of words, to look up those of training rows."""

    def __init__(self, samples: Sequence[Sample], report: Report) -> None:
        self._report = report
        self._known: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for sample in samples:
            runs = set(_runs(sample.prompt))
            if not runs:
                report.short.append(sample.id)
            for run in runs:
                self._known[run].append(sample.id)
        self._known = {run: ids for run, ids in self._known.items() if len(ids) <= SHARED}
        self._told: set[str] = set()

    def look(self, row: Row, where: str) -> None:
        for text in _texts_of(row):
            for run in _runs(text):
                for sample in self._known.get(run, ()):
                    if sample not in self._told:
                        self._told.add(sample)
                        self._report.found.append(Found(sample, "text", where, " ".join(run)))


class _Pictures:
    """The samples' pictures, to compare those of training rows with."""

    def __init__(self, samples: Sequence[Sample], report: Report) -> None:
        self._report = report
        self._ids: dict[str, list[str]] = defaultdict(list)  # digest → samples
        looks: dict[str, Look] = {}
        for sample in samples:
            for read in sample.images:
                try:
                    look = look_at(read())
                except (ImageError, DataError, OSError) as error:
                    report.unread.append(f"{sample.id}: {error}")
                    continue
                self._ids[look.digest].append(sample.id)
                looks[look.digest] = look
        self._looks = [look for look in looks.values() if look.hash is not None]
        self._hashes = np.array([look.hash for look in self._looks], dtype=np.uint64)
        self._told: Counter[tuple[str, Kind]] = Counter()

    def look(self, data: DataSet, image: str, where: str) -> None:
        try:
            look = look_at(data.read(image))
        except (ImageError, DataError, OSError) as error:
            self._report.unread.append(f"{where}: {error}")
            return
        if look.digest in self._ids:
            self._tell(look.digest, "same image", f"{where}: {image}", look.digest)
        elif look.hash is not None and len(self._hashes):
            apart = np.bitwise_count(self._hashes ^ np.uint64(look.hash))
            for index in np.flatnonzero(apart <= BITS):
                other = self._looks[index]
                shades = float(np.abs(look.thumbnail.astype(float) - other.thumbnail).mean())
                if shades <= SHADES:
                    told = f"{apart[index]} of 64 bits, {shades:.1f} shades apart"
                    self._tell(other.digest, "like image", f"{where}: {image}", told)

    def _tell(self, digest: str, kind: Kind, where: str, told: str) -> None:
        for sample in self._ids[digest]:
            self._told[sample, kind] += 1
            if self._told[sample, kind] == 1:
                self._report.found.append(Found(sample, kind, where, told))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    """Every 13 words in a row, in small letters, without marks."""
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - WORDS + 1):
        yield tuple(words[start : start + WORDS])


def _texts_of(row: Row) -> Iterator[str]:
    for message in row.messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content if part["type"] == "text")
