from pathlib import Path

import pytest

from basalt.data.preprocess import IGNORE, Sample
from basalt.data.readers import DataError, Row, Unusable
from basalt.data.selection import BROKEN, TOO_LONG, UNLABELLED, Counts, learnable, usable, with_images


def counted(rows: int, **dropped: int) -> Counts:
    counts = Counts(Path("a.json"))
    counts.rows = rows
    for reason, number in dropped.items():
        for n in range(number):
            counts.drop(reason, f"row {n}", "something else")
    return counts


def test_each_row_is_kept_or_counted_once() -> None:
    rows = [Row((f"{n}.jpg",), [], f"row {n}") for n in range(5)]
    counts = Counts(Path("a.json"))
    assert usable([*rows, Unusable("row 5", "not an object", "str")], counts) == rows
    lengths = [3, 9, 3, 3, 3]
    samples = [(row, Sample([7] * n, [7] * n)) for row, n in zip(rows, lengths, strict=True)]
    samples[2] = rows[2], Sample([7] * 3, [IGNORE] * 3)
    kept = with_images(learnable(samples, 8, counts), {"3.jpg": "it is not there", "1.jpg": "broken"}, counts)
    assert [row for row, _ in kept] == [rows[0], rows[4]]
    assert counts.rows == 6
    assert {reason: dropped.examples for reason, dropped in counts.dropped.items()} == {
        "not an object": ["row 5: str"],
        TOO_LONG: ["row 1: 9 tokens, row_length is 8"],
        UNLABELLED: ["row 2: 3 tokens"],
        BROKEN: ["row 3: 3.jpg: it is not there"],
    }


def test_up_to_5_percent_may_be_dropped() -> None:
    assert counted(100, odd=2, strange=3).problem() is None
    counts = counted(100, odd=2, strange=4)
    assert counts.problem() == (
        "a.json: of 100 rows, 6 dropped: 2 × odd (row 0: something else), 4 × strange (row 0: something else);"
        " at most 5% may be dropped"
    )
    assert [len(dropped.examples) for dropped in counts.dropped.values()] == [2, 3]
    with pytest.raises(DataError, match="at most 5% may be dropped"):
        counts.check()


def test_up_to_1_percent_may_be_without_a_label() -> None:
    assert counted(100, **{UNLABELLED: 1}).problem() is None
    assert "at most 1% may be without a label" in str(counted(100, **{UNLABELLED: 2}).problem())


def test_a_file_without_rows_is_a_problem() -> None:
    assert counted(0).problem() == "a.json holds no rows"
