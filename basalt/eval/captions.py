"""Captions of one's own photos against several references each: CIDEr-D and BLEU, on the scales of coco-caption.

The numbers are those of the COCO caption evaluation (Chen et al. 2015, "Microsoft COCO Captions"; Vedantam et
al. 2015, "CIDEr"; Papineni et al. 2002, "BLEU"), down to its small constants, so that they compare with papers.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from basalt.data.readers import DataError, ImageSource
from basalt.eval.benchmark import Rule, Sample, Scored, Verdict, mean, no_answer
from basalt.eval.records import checked, image_in, read_rows, require

Ngrams = Counter[tuple[str, ...]]

COCO = "coco-caption"  # the way of scoring
PROMPT = "Describe the image."

IN_COMMON = Rule("words in common", "read", "the caption shares words with its references: the more, the rarer")
NOTHING = Rule("nothing in common", "read", "the caption shares no word with its references that others do not have")

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of CIDEr-D's length penalty, in words

_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|re|ve|d|ll))\b")
_FUSED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
_TOKEN = re.compile(
    r"""(?:[a-z]\.){2,}                                    # u.s.
      | \b(?:mr|mrs|ms|dr|st|jr|sr|vs)\.                   # titles keep their dot
      | n't | '(?:s|m|re|ve|d|ll)\b                        # after _CONTRACTION
      | \d+(?:[.,:]\d+)+                                   # 1,000  2.5  3:30
      | [@]?\w+(?:[-/'.&]\w+)*                             # t-shirt  o'clock  a/b
      | --+ | \.\.\.
      | \S""",
    re.VERBOSE,
)
# The tokenizer's names for brackets. In lower case they escape coco-caption's own list of what to remove.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_REMOVED = frozenset(
    ["'", '"', "`", "\u2018", "\u2019", "\u201c", "\u201d", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def tokenise(text: str) -> list[str]:
    """Words as coco-caption's PTB step leaves them: lower case, contractions apart, punctuation gone."""
    spaced = _FUSED.sub(lambda found: " ".join(filter(None, found.groups())), text.lower())
    spaced = _CONTRACTION.sub(r" \1", spaced)
    words: list[str] = _TOKEN.findall(spaced)
    return [_BRACKETS.get(word, word) for word in words if word not in _REMOVED]


def read_samples(path: Path, images: Path | None = None) -> list[Sample]:
    """The samples of JSON or JSONL: records with `image`, its name, and `captions`, the references.

    Raises:
        DataError: a record is not of this form.
    """
    source = ImageSource(images) if images else None
    samples = []
    for number, record in enumerate(read_rows(path)):
        where = f"{path}, row {number}"
        name, texts = (require(record, ("image", "captions"), where)[key] for key in ("image", "captions"))
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: 'captions' are the references, a list of texts; found {texts!r}")
        samples.append(Sample(str(name), PROMPT, tuple(texts), images=(image_in(source, name),), cluster=str(name)))
    return checked(samples, path)


def scorer(samples: Sequence[Sample]) -> Callable[[Sample, str], dict[str, Verdict]]:
    """What scores one caption: its CIDEr-D (0 to 10), by how rare words are in the references of all the samples."""
    ciderd = CiderD({sample.id: sample.gold for sample in samples})

    def score(sample: Sample, prediction: str) -> dict[str, Verdict]:
        found = ciderd.score(sample.id, prediction)
        rule = IN_COMMON if found else no_answer(prediction) or NOTHING
        return {COCO: Verdict(found, rule, " ".join(tokenise(prediction)))}

    return score


def measure(scored: Sequence[Scored], way: str) -> dict[str, float]:
    """CIDEr-D × 100, and BLEU of the whole in percent; a sample with no answer counts as an empty caption."""
    orders = bleu(
        {one.sample.id: one.prediction or "" for one in scored}, {one.sample.id: one.sample.gold for one in scored}
    )
    figures = {"cider": 100 * mean(one.verdicts[way].score for one in scored)}
    return figures | {f"bleu_{order}": 100 * value for order, value in enumerate(orders, 1)}


class CiderD:
    """Scores captions of these images. How rare words are is counted over all their references.

    Raises:
        ValueError: there are no images, or one has no reference.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        _need_references(references)
        cooked = {image: [_ngrams(tokenise(text)) for text in texts] for image, texts in references.items()}
        self._frequency = Counter(ngram for texts in cooked.values() for ngram in set().union(*texts))
        self._images = math.log(len(cooked))
        self._references = {
            image: [(_bigrams(text), *self._weigh(text)) for text in texts] for image, texts in cooked.items()
        }

    def score(self, image: str, caption: str) -> float:
        """CIDEr-D of one caption, 0 to 10."""
        ngrams = _ngrams(tokenise(caption))
        vectors, norms = self._weigh(ngrams)
        similarity = 0.0
        for bigrams, *reference in self._references[image]:
            penalty = math.exp(-((_bigrams(ngrams) - bigrams) ** 2) / (2 * SIGMA**2))
            for ours, our_norm, theirs, their_norm in zip(vectors, norms, *reference, strict=True):
                product = sum(
                    min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs
                )
                similarity += penalty * product / ((our_norm * their_norm) or 1.0)
        return 10.0 * similarity / ORDERS / len(self._references[image])

    def _weigh(self, ngrams: Ngrams) -> tuple[list[dict[tuple[str, ...], float]], list[float]]:
        """TF-IDF vectors by order, and their norms."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for ngram, count in ngrams.items():
            vectors[len(ngram) - 1][ngram] = count * (self._images - math.log(max(1, self._frequency[ngram])))
        return vectors, [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]


def cider(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """CIDEr-D over a corpus, on coco-caption's scale (0 to 10; good captions of photographs reach about 1).

    Document frequencies are counted over these references, so the figure depends on the whole set of images.

    Raises:
        ValueError: the two do not name the same images, or an image has no reference.
    """
    _check(candidates, references)
    ciderd = CiderD(references)
    return mean(ciderd.score(image, caption) for image, caption in candidates.items())


def bleu(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of a corpus, 0 to 1, with the closest reference length of each caption.

    Raises:
        ValueError: the two do not name the same images, or an image has no reference.
    """
    _check(candidates, references)
    length = closest = 0
    guessed, correct = [0] * ORDERS, [0] * ORDERS
    for image, texts in references.items():
        words = tokenise(candidates[image])
        tokenised = [tokenise(text) for text in texts]
        length += len(words)
        closest += min((abs(len(text) - len(words)), len(text)) for text in tokenised)[1]
        allowed: Ngrams = Counter()
        for text in tokenised:
            allowed |= _ngrams(text)
        for ngram, count in _ngrams(words).items():
            guessed[len(ngram) - 1] += count
            correct[len(ngram) - 1] += min(count, allowed[ngram])
    small, tiny = 1e-9, 1e-15  # coco-caption's guards against division by zero
    ratio = (length + tiny) / (closest + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order in range(ORDERS):
        product *= (correct[order] + tiny) / (guessed[order] + small)
        scores.append(brevity * product ** (1 / (order + 1)))
    return scores[0], scores[1], scores[2], scores[3]


def _ngrams(words: list[str]) -> Ngrams:
    return Counter(
        tuple(words[start : start + order]) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1)
    )


def _bigrams(ngrams: Ngrams) -> int:
    """coco-caption's measure of length."""
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)


def _check(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if candidates.keys() != references.keys():
        odd = sorted(candidates.keys() ^ references.keys())
        raise ValueError(f"captions and references must name the same images; {len(odd)} are in one only: {odd[:3]}")
    _need_references(references)


def _need_references(references: Mapping[str, Sequence[str]]) -> None:
    bare = [image for image, texts in references.items() if not texts]
    if bare or not references:
        raise ValueError(f"each image needs a reference: {bare[:3] or 'there are no images'}")
