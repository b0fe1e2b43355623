import pytest

from basalt.data.emoji import CATEGORY, indefinite, plural
from basalt.data.scenes import COLOURS, held_out_words
from basalt.eval.scenes import Score, score, wilson


def accuracy(kind: str, gold: str, answer: str) -> float:
    return score([{"kind": kind, "gold": gold}], [answer])[kind].accuracy


@pytest.mark.parametrize("noun", CATEGORY)
def test_every_noun_is_found_in_either_number(noun: str) -> None:
    for answer in (
        indefinite(noun),
        f"There are two {plural(noun).upper()} in it.",
        f"It is {indefinite(noun)}, I think.",
    ):
        assert accuracy("what", noun, answer) == 1
    others = [other for other in CATEGORY if other != noun]
    assert [other for other in others if accuracy("what", noun, f"This is {indefinite(other)}.")] == []


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "right"),
    [
        ("what", "plane", "An airplane in the sky.", True),
        ("what", "grapes", "a grape", True),
        ("what", "circle", "a red circle", True),
        ("what", "dog", "a hot dog", False),
        ("what", "dog", "a hot dog and a dog", True),
        ("what", "cat", "a catalogue", False),
        ("what", "bear", "a teddy bear", False),
        ("count", "three", "There are 3 dogs.", True),
        ("count", "three", "three", True),
        ("count", "three", "two or three", False),
        ("count", "one", "someone", False),
        ("count", "five", "", False),
        ("colour", "red", "It is Red, not blue.", True),
        ("colour", "blue", "It is Red, not blue.", False),
        ("colour", "red", "it is covered", False),
        ("colour", "purple", "violet", True),
        ("where", "middle", "in the center", True),
        ("where", "left", "on the right of the left one", False),
        ("where", "top", "at the top", True),
        ("yesno", "yes", "Yes, there is no doubt.", True),
        ("yesno", "no", "No, there is not.", True),
        ("yesno", "no", "I know it, yes", False),
        ("read", "safe", 'It says "SAFE".', True),
        ("read", "safe", "It says unsafe.", False),
        ("chart", "yellow", "the yellow bar", True),
        ("chart", "four", "4 bars", True),
        ("chart", "four", "the yellow bar", False),
    ],
)
def test_rules(kind: str, gold: str, answer: str, right: bool) -> None:
    assert accuracy(kind, gold, answer) == right


def test_every_colour_is_itself_only() -> None:
    for gold in COLOURS:
        assert [colour for colour in COLOURS if accuracy("colour", gold, f"a {colour} one")] == [gold]


def test_yes_no_is_balanced() -> None:
    rows = [{"kind": "yesno", "gold": "yes"}] * 90 + [{"kind": "yesno", "gold": "no"}] * 10
    always = score(rows, ["yes"] * 100)["yesno"]
    assert always.accuracy == 0.5
    assert always.count == 100
    assert always.low < 0.5 < always.high
    three_quarters = score(rows, ["yes"] * 90 + ["no", "yes"] * 5)["yesno"]
    assert three_quarters.accuracy == 0.75


def test_words_are_told_apart_by_whether_training_shows_them() -> None:
    unseen = sorted(held_out_words())[:2]
    rows = [{"kind": "read", "gold": word} for word in [*unseen, "zzz"]]
    scores = score(rows, [unseen[0], "nothing", "zzz"])
    assert {kind: (part.accuracy, part.count) for kind, part in scores.items()} == {
        "read": (pytest.approx(2 / 3), 3),
        "read_unseen": (0.5, 2),
        "read_seen": (1.0, 1),
    }


def test_wilson_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)  # R: binom::binom.wilson(8, 10)
    assert wilson(0, 20)[0] == 0.0
    assert score([{"kind": "count", "gold": "one"}] * 10, ["1"] * 8 + ["2"] * 2) == {
        "count": Score(0.8, 10, *wilson(8, 10))
    }


def test_descriptions_are_passed_over_and_mistakes_refused() -> None:
    assert score([{"kind": "caption", "gold": "dog"}, {"kind": "spell", "gold": "dog"}], ["", ""]) == {}
    with pytest.raises(ValueError, match="1 answers for 0 rows"):
        score([], ["yes"])
    with pytest.raises(ValueError, match="no rule for kind 'mood'"):
        score([{"kind": "mood", "gold": "good"}], ["good"])
