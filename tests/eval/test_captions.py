"""The golden values are those of pycocoevalcap 1.2 (CiderScorer, BleuScorer with closest length) on the same words."""

from pathlib import Path
from typing import Any

import pytest

from basalt.data.readers import DataError
from basalt.eval.captions import COCO, CiderD, bleu, cider, read_samples, tokenise
from basalt.eval.scoring import find, score_answers
from tests.eval.published_files import write_lines
from tests.eval.strange_answers import strange_answers

REFERENCES = {
    "beach": [
        "Two dogs run along the beach .",
        "A brown dog and a black dog are running on the sand .",
        "Dogs racing by the sea",
    ],
    "ball": ["A child kicks a red ball in the park .", "A boy in a t-shirt is playing with a ball ."],
    "bike": [
        "A man's bike isn't in the garage .",
        "A man rides a bicycle down the street .",
        "The man is riding his bike, fast!",
        "A cyclist on a road",
    ],
    "girl": ["A girl (smiling) holds a cat .", "The girl has a cat in her arms ."],
}
CANDIDATES = {
    "beach": "Two dogs run on the beach.",
    "ball": "A boy kicks a ball in the park in the park in the park",  # clipped counts, too long
    "bike": "A man is riding a bike down the street",
    "girl": "a dog",  # too short, no common bigram
}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog's ball isn't on the grass, is it?", "a dog 's ball is n't on the grass is it"),
        (
            'Two men (one with a t-shirt) play "football" at 3:30 p.m.',
            "two men -lrb- one with a t-shirt -rrb- play football at 3:30 p.m.",
        ),
        ("He said: 'hello' -- they can't, cannot & gonna...", "he said hello they ca n't can not & gon na"),
        ("a $5 bill ! the U.S. flag; 1,000 people's 2.5%", "a $ 5 bill the u.s. flag 1,000 people 's 2.5 %"),
        ("", ""),
    ],
)
def test_words_are_those_of_the_penn_treebank_tokenizer(text: str, words: str) -> None:
    assert tokenise(text) == words.split()


def test_cider_equals_coco_caption() -> None:
    assert cider(CANDIDATES, REFERENCES) == pytest.approx(1.1535690651871158, abs=1e-9)


def test_bleu_equals_coco_caption() -> None:
    expected = (0.7258227040825409, 0.6148504886490698, 0.4255207454838264, 0.24514797206816238)
    assert bleu(CANDIDATES, REFERENCES) == pytest.approx(expected, abs=1e-9)


def test_a_caption_equal_to_its_only_references_scores_ten_and_an_empty_one_nothing() -> None:
    references = {"a": ["a dog runs on grass"], "b": ["two men sit at tables"]}
    assert cider({"a": "A dog runs on grass.", "b": "Two men sit at tables."}, references) == pytest.approx(10.0)
    assert cider({"a": "", "b": ""}, references) == 0.0
    assert bleu({"a": "", "b": ""}, references) == pytest.approx((0, 0, 0, 0), abs=1e-6)


@pytest.mark.parametrize("score", [cider, bleu])
def test_images_must_agree_and_have_references(score) -> None:
    with pytest.raises(ValueError, match="same images"):
        score({"beach": "a"}, REFERENCES)
    with pytest.raises(ValueError, match="needs a reference"):
        score({"beach": "a"}, {"beach": []})
    with pytest.raises(ValueError, match="no images"):
        score({}, {})


def write_captions(path: Path, **changes: Any) -> Path:
    return write_lines(path, [{"image": image, "captions": texts} | changes for image, texts in REFERENCES.items()])


def test_as_a_benchmark_the_scores_are_those_of_the_corpus(tmp_path: Path) -> None:
    samples = read_samples(write_captions(tmp_path / "captions.jsonl"))
    scores = score_answers("captions", samples, CANDIDATES)
    expected = (0.7258227040825409, 0.6148504886490698, 0.4255207454838264, 0.24514797206816238)
    assert scores.overall[COCO]["cider"] == pytest.approx(115.35690651871158, abs=1e-7)
    assert [scores.overall[COCO][f"bleu_{order}"] for order in (1, 2, 3, 4)] == pytest.approx(
        [100 * value for value in expected], abs=1e-7
    )
    assert {one.sample.id: one.verdicts[COCO].rule.kind for one in scores.scored} == dict.fromkeys(REFERENCES, "read")
    alone = CiderD(REFERENCES)
    assert all(one.verdicts[COCO].score == alone.score(one.sample.id, one.prediction) for one in scores.scored)


@pytest.mark.parametrize("captions", [None, [], "a dog", [1]])
def test_references_that_are_none_are_named(tmp_path: Path, captions: Any) -> None:
    with pytest.raises(DataError, match="row 0: 'captions' are the references"):
        read_samples(write_captions(tmp_path / "captions.jsonl", captions=captions))


def test_an_image_twice_and_a_missing_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an id of its own"):
        read_samples(write_captions(tmp_path / "captions.jsonl", image="beach"))
    with pytest.raises(DataError, match="row 0: has no 'captions'; it has 'image'"):
        read_samples(write_lines(tmp_path / "captions.jsonl", [{"image": "beach"}]))


def test_twenty_thousand_strange_captions_crash_nothing_and_score_the_same_twice(tmp_path: Path) -> None:
    samples = read_samples(write_captions(tmp_path / "captions.jsonl"))
    score, answers = find("captions").scorer(samples), list(strange_answers())
    first = [score(samples[0], answer)[COCO] for answer in answers]
    assert [score(samples[0], answer)[COCO] for answer in answers] == first
    assert len(answers) == 20_000 and all(0 <= verdict.score <= 10 for verdict in first)
