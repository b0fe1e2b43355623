"""The golden values are those of pycocoevalcap 1.2 (CiderScorer, BleuScorer with closest length) on the same words."""

import pytest

from basalt.eval.captions import bleu, cider, tokenise

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
