import random
from collections import Counter

from basalt.data.grouping import Group, deal, fill_rows, group_samples, pass_length
from basalt.data.preprocess import IGNORE, Sample

LENGTH = 40
IMAGE = 16


def test_an_image_with_more_questions_than_a_row_holds_goes_on_in_another() -> None:
    many = [(("a",), Sample([16] * 4 + [200 + n] + [300] * 5, [IGNORE] * 5 + [300] * 5)) for n in range(20)]
    groups = group_samples(many, LENGTH, IMAGE)
    assert len(groups) > 1
    assert all(len(group) <= LENGTH and group.prefix == [16] * 4 for group in groups)
    assert sum(len(group.branches) for group in groups) == 20


def test_rows_are_filled_and_dealt_alike_by_the_same_seed() -> None:
    groups = [Group((), [], [Sample([n] * (n % 17 + 3), [n] * (n % 17 + 3))]) for n in range(300)]
    rows = fill_rows(groups, LENGTH, random.Random(1))
    assert rows == fill_rows(groups, LENGTH, random.Random(1))
    assert rows != fill_rows(groups, LENGTH, random.Random(2))
    assert sorted(group.branches[0].ids[0] for row in rows for group in row) == list(range(300))
    assert sum(map(len, groups)) / (len(rows) * LENGTH) > 0.9


def test_an_epoch_deals_each_group_by_its_weight_in_rows_of_like_length() -> None:
    often, seldom = ([Group((), [], [Sample([kind] * n, [kind] * n)]) for n in range(3, 39)] for kind in (1, 2))
    passes = deal([(often, 2.0), (seldom, 0.5)], LENGTH, 4, random.Random(0))
    dealt = Counter(group.branches[0].ids[0] for rows in passes for row in rows for group in row)
    assert dealt == {1: 72, 2: 18}
    assert all(len(rows) <= 4 for rows in passes)
    lengths = [[sum(map(len, row)) for row in rows] for rows in passes]
    assert [pass_length(rows, LENGTH) for rows in passes] == [min(-(-max(row) // 32) * 32, LENGTH) for row in lengths]
    assert passes == deal([(often, 2.0), (seldom, 0.5)], LENGTH, 4, random.Random(0))
    assert deal([], LENGTH, 4, random.Random(0)) == []
