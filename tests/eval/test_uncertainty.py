import random
import time
from collections.abc import Sequence

import numpy as np
import pytest

from basalt.eval import pope
from basalt.eval.benchmark import ACCURACY, OFFICIAL, Rule, Sample, Scored, Verdict
from basalt.eval.scoring import BENCHMARKS
from basalt.eval.uncertainty import compare, holm, interval, mcnemar

RULE = Rule("read", "read", "")


def verdicts(scores: Sequence[float], clusters: Sequence[object] | None = None) -> list[Scored]:
    return [
        Scored(
            Sample(str(number), "", ("x",), cluster=str(clusters[number]) if clusters else str(number)),
            "",
            {OFFICIAL: Verdict(float(score), RULE)},
        )
        for number, score in enumerate(scores)
    ]


def test_the_interval_of_a_mean_is_that_of_scipys_bootstrap() -> None:
    """`scipy.stats.bootstrap(…, np.mean, method="BCa")` of 200,000 draws."""
    scores = [(number * 37 % 101 / 100) ** 3 for number in range(120)]
    found = interval(verdicts(scores), OFFICIAL, ACCURACY)
    assert found.value == pytest.approx(24.618225833)
    assert (found.low, found.high) == pytest.approx((19.9038, 30.0758), abs=0.2)


def test_it_covers_the_truth_as_often_as_it_says_where_questions_share_a_picture() -> None:
    """40 pictures of 6 questions that are right or wrong mostly together: questions alone are far too sure."""
    draw = np.random.default_rng(3)
    pictures = np.repeat(np.arange(40), 6)
    covered = {"pictures": 0, "questions": 0}
    trials = 300
    for _ in range(trials):
        ease = np.repeat(draw.beta(1.2, 0.8, 40), 6)  # mean 0.6
        scores = (draw.random(240) < ease).tolist()
        for name, clusters in (("pictures", pictures.tolist()), ("questions", None)):
            found = interval(verdicts(scores, clusters), OFFICIAL, ACCURACY, draws=600)
            covered[name] += found.low <= 60 <= found.high
    assert 0.91 <= covered["pictures"] / trials <= 0.98
    assert covered["questions"] / trials < 0.85


def test_the_f1_of_pope_is_bootstrapped_itself_and_is_what_it_measures() -> None:
    draw = random.Random(4)
    scored = []
    for number in range(1200):
        gold = draw.choice(["yes", "no"])
        groups = {"category": (draw.choice(["random", "popular", "adversarial"]),)}
        said = draw.choice([gold, gold, gold, "yes", "no", "perhaps"])
        sample = Sample(str(number), "", (gold,), groups=groups, cluster=str(number // 6))
        scored.append(Scored(sample, said, pope.score(sample, said)))
    for way in ("official", "strict"):
        found = interval(scored, way, pope.F1)
        assert found.value == pytest.approx(pope.measure(scored, way)["f1"])
        assert found.low < found.value < found.high
        category = [one for one in scored if one.sample.groups["category"] == ("popular",)]
        assert interval(category, way, pope.F1).value == pytest.approx(pope.measure(category, way)["f1"])


def test_every_benchmarks_metric_is_its_first_figure() -> None:
    for benchmark in BENCHMARKS.values():
        way = benchmark.ways[0]
        sample = Sample("1", "", ("yes",), groups={"category": ("random",)})
        scored = [Scored(sample, "", {way: Verdict(1.0, RULE)}), Scored(sample, "", {way: Verdict(0.0, RULE)})]
        name, value = next(iter(benchmark.measure(scored, way).items()))
        assert (name, value) == (benchmark.metric.name, interval(scored, way, benchmark.metric).value)


@pytest.mark.parametrize(("score", "low", "high"), [(1.0, 69.15, 100), (0.0, 0, 30.85)])
def test_all_right_is_not_certain(score: float, low: float, high: float) -> None:
    """The bounds of Clopper and Pearson for 10 of 10."""
    found = interval(verdicts([score] * 10), OFFICIAL, ACCURACY)
    assert found.value == 100 * score
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)


def test_the_same_verdicts_have_the_same_interval_and_ten_thousand_draws_are_quick() -> None:
    scores = np.random.default_rng(5).integers(0, 2, 5000).tolist()
    began = time.monotonic()
    first = interval(verdicts(scores), OFFICIAL, ACCURACY)
    assert time.monotonic() - began < 10
    assert interval(verdicts(scores), OFFICIAL, ACCURACY) == first
    assert first.high - first.low == pytest.approx(2 * 1.96 * 50 / 5000**0.5, rel=0.05)
    with pytest.raises(ValueError, match="no samples"):
        interval([], OFFICIAL, ACCURACY)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        (0, 0, 1.0), (1, 0, 1.0), (5, 15, 0.04138946533203125), (15, 5, 0.04138946533203125), (30, 31, 1.0),
        (5, 25, 0.0003249142318964), (700, 800, 0.010559255466712),
    ],
)  # fmt: skip
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int, p: float) -> None:
    """The values are those of `scipy.stats.binomtest`."""
    assert mcnemar(lost, won) == pytest.approx(p, rel=1e-9)


def test_holm_adjusts_several_ps() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_right_and_wrong_are_compared_by_mcnemar_in_any_order() -> None:
    before, after = [1] * 60 + [0] * 40, [1] * 55 + [0] * 5 + [1] * 25 + [0] * 15
    found = compare(verdicts(before), verdicts(after)[::-1], OFFICIAL, ACCURACY)
    assert (found.test, found.samples, found.first, found.second) == ("McNemar, exact", 100, 60, 80)
    assert found.p == pytest.approx(0.0003249142318964)
    assert found.difference.value == pytest.approx(20) and found.difference.low > 0
    back = compare(verdicts(after), verdicts(before), OFFICIAL, ACCURACY)
    assert back.p == found.p and back.difference.value == pytest.approx(-20)


def test_parts_of_a_point_and_shared_pictures_are_compared_by_bootstrap() -> None:
    draw = np.random.default_rng(6)
    before = draw.random(200)
    found = compare(verdicts(before.tolist()), verdicts((before * 0.9).tolist()), OFFICIAL, ACCURACY)
    assert found.test == "paired bootstrap" and found.p < 0.001 and found.difference.high < 0
    noise = compare(verdicts(before.tolist()), verdicts(draw.permutation(before).tolist()), OFFICIAL, ACCURACY)
    assert noise.p > 0.05 and noise.difference.low < 0 < noise.difference.high
    # Ten pictures answered otherwise, each six times: sixty samples, but ten observations.
    clusters = [number // 6 for number in range(600)]
    other = [1.0] * 42 + [0.0] * 18 + [0.5] * 540
    same = [0.0] * 42 + [1.0] * 18 + [0.5] * 540
    shared = compare(verdicts(same, clusters), verdicts(other, clusters), OFFICIAL, ACCURACY)
    alone = compare(verdicts(same), verdicts(other), OFFICIAL, ACCURACY)
    assert alone.p < 0.01 < 0.05 < shared.p


def test_a_paired_test_errs_as_often_as_it_says() -> None:
    draw = np.random.default_rng(7)
    clusters = np.repeat(np.arange(60), 3).tolist()
    wrong = 0
    for _ in range(200):
        pair = [(draw.random(180) < np.repeat(draw.beta(2, 2, 60), 3)).tolist() for _ in range(2)]
        first, second = (verdicts(scores, clusters) for scores in pair)
        wrong += compare(first, second, OFFICIAL, ACCURACY, draws=400).p < 0.05
    assert wrong / 200 < 0.1


def test_nothing_is_compared_with_other_samples() -> None:
    for other in (verdicts([1, 0]), verdicts([1, 0, 1, 1]), verdicts([1, 0, 1])[:2] * 2):
        with pytest.raises(ValueError, match="on the same samples"):
            compare(verdicts([1, 0, 1]), other, OFFICIAL, ACCURACY)
    same = compare(verdicts([1, 0, 1]), verdicts([1, 0, 1]), OFFICIAL, ACCURACY)
    assert same.p == 1 and same.difference.value == 0 and same.difference.low < 0 < same.difference.high
