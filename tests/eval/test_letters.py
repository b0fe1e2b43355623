import pytest

from basalt.eval.benchmark import EMPTY, REFUSAL, Rule
from basalt.eval.letters import (
    AMBIGUOUS,
    BRACKETED,
    LEADING,
    LETTER,
    OPTION,
    OUTSIDE,
    STATED,
    UNREADABLE,
    read_letter,
)

OPTIONS = ["a red car", "a blue car", "C#", "It is raining"]


@pytest.mark.parametrize(
    ("response", "letter", "rule"),
    [
        ("B", "B", LETTER),
        (" b.", "B", LETTER),
        ("(B)", "B", LETTER),
        ("**B)**", "B", LETTER),
        (".B", "B", LETTER),
        ("option b", "B", LETTER),
        ("The answer is B", "B", STATED),
        ("Answer: (B), because of its colour", "B", STATED),
        ("I would say that the correct option is B.", "B", STATED),
        ("The answer is A.", "A", STATED),
        ("B. a blue car", "B", LEADING),
        ("(B) a blue car", "B", LEADING),
        ("Let me see.\nB) a blue car", "B", LEADING),
        ("It must be (B) then", "B", BRACKETED),
        ("A blue car.", "B", OPTION),
        ("c#", "C", OPTION),
        ("A or B", "", UNREADABLE),
        ("The answer is a red car", "", UNREADABLE),  # more than the option's text: read by no rule
        ("(A) or (B)", "", AMBIGUOUS),
        ("The answer is B. No, the answer is D.", "", AMBIGUOUS),
        ("A. a red car\nB. a blue car", "", AMBIGUOUS),
        ("E", "", OUTSIDE),
        ("The answer is Z.", "", OUTSIDE),
        ("a car", "", UNREADABLE),
        ("A dog", "", UNREADABLE),
        ("I think so", "", UNREADABLE),
        ("", "", EMPTY),
        (" \n ", "", EMPTY),
        ("I'm sorry, I cannot see the picture.", "", REFUSAL),
    ],
)
def test_a_letter_is_read_where_just_one_is_named(response: str, letter: str, rule: Rule) -> None:
    assert read_letter(response, OPTIONS) == (letter, rule)


def test_two_options_of_the_same_text_are_not_told_apart() -> None:
    assert read_letter("blue", ["blue", "Blue", "red"]) == ("", AMBIGUOUS)
