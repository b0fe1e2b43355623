from pathlib import Path
from typing import Any

import pytest

from basalt.data.readers import DataError
from basalt.eval.benchmark import EMPTY, OFFICIAL, REFUSAL, STRICT, Rule
from basalt.eval.pope import (
    BOTH,
    NEGATIVE,
    NEITHER,
    ONE_WORD,
    OTHERWISE,
    POSITIVE,
    read_official,
    read_samples,
    read_strict,
)
from basalt.eval.scoring import rescore
from tests.eval.published_files import picture, png, write_lines, write_parquet


def rows(*labels: str) -> list[dict[str, Any]]:
    return [
        {"question_id": n, "image": f"{n // 2}.jpg", "text": f"Is there a dog, number {n}?", "label": label}
        for n, label in enumerate(labels, 1)
    ]


def answers(path: Path, said: dict[str, str]) -> Path:
    return write_lines(path, [{"question_id": int(id), "prompt": "…", "text": text} for id, text in said.items()])


@pytest.mark.parametrize(
    ("answer", "official", "rule", "strict", "strict_rule"),
    [
        ("No", "no", NEGATIVE, "no", ONE_WORD),
        ("no, there is not", "no", NEGATIVE, "no", ONE_WORD),
        ("There is not. Yes", "no", NEGATIVE, "yes", ONE_WORD),
        ("Yes", "yes", POSITIVE, "yes", ONE_WORD),
        ("yes, there is", "yes", POSITIVE, "yes", ONE_WORD),
        ("Yes. No", "yes", POSITIVE, "", BOTH),
        ("NO", "yes", OTHERWISE, "no", ONE_WORD),
        ("\nNo", "yes", OTHERWISE, "no", ONE_WORD),
        ("nope", "yes", OTHERWISE, "", NEITHER),
        ("There is a dog", "yes", OTHERWISE, "", NEITHER),
        ("", "yes", OTHERWISE, "", EMPTY),
        ("I'm sorry, I can't tell", "yes", OTHERWISE, "", REFUSAL),
    ],
)
def test_an_answer_is_read_as_the_official_script_does_and_strictly(
    answer: str, official: str, rule: Rule, strict: str, strict_rule: Rule
) -> None:
    assert read_official(answer) == (official, rule)
    assert read_strict(answer) == (strict, strict_rule)


def test_the_score_is_the_mean_f1_of_the_categories(tmp_path: Path) -> None:
    write_lines(tmp_path / "coco_pope_random.json", rows("yes", "yes", "no", "no"))
    write_lines(tmp_path / "coco_pope_adversarial.json", rows("yes", "no"))
    said = {"10000001": "Yes", "10000002": "No", "10000003": "Yes", "10000004": "No", "1": "Yes", "2": "No"}
    # Backwards: answers go by their ids, not by their order.
    scores = rescore("pope", tmp_path, answers(tmp_path / "a.jsonl", dict(reversed(said.items()))))
    categories = {name: figures[OFFICIAL] for name, (_, figures) in scores.groups["category"].items()}
    assert categories["random"] == {"f1": 50, "accuracy": 50, "precision": 50, "recall": 50, "yes_ratio": 50}
    assert categories["adversarial"]["f1"] == 100
    assert scores.overall[OFFICIAL]["f1"] == 75


def test_what_is_not_read_is_a_miss_or_a_false_alarm_and_nothing_divides_by_zero(tmp_path: Path) -> None:
    write_lines(tmp_path / "coco_pope_random.json", rows("no", "no", "no"))
    said = answers(tmp_path / "a.jsonl", {"10000001": "No", "10000002": "No", "10000003": "maybe"})
    scores = rescore("pope", tmp_path, said)
    assert scores.overall[STRICT] == pytest.approx(
        {"f1": 0, "accuracy": 200 / 3, "precision": 0, "recall": 0, "yes_ratio": 100 / 3}
    )


def test_samples_ask_about_their_picture_and_share_it(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "coco_pope_popular.json", rows("yes", "no", "no"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "1.jpg").write_bytes(png())
    samples = read_samples(file, pictures)
    assert [(sample.id, sample.cluster) for sample in samples] == [
        ("20000001", "0.jpg"), ("20000002", "1.jpg"), ("20000003", "1.jpg"),
    ]  # fmt: skip
    image, text = samples[1].messages()[0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == "Is there a dog, number 2?\nAnswer the question using a single word or phrase."
    with pytest.raises(DataError, match=r"0\.jpg"):
        samples[0].messages()
    with pytest.raises(DataError, match="say in which folder"):
        read_samples(file)[1].messages()


def test_the_parquet_is_the_same_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "test.parquet"
    told = {"question": "Is there a dog, number 1?", "image_source": "0.jpg", "image": picture()}
    write_parquet(file, [{"question_id": "1", "answer": "yes", "category": "random", **told}])
    write_lines(tmp_path / "coco_pope_random.json", rows("yes"))
    (sample,) = read_samples(file)
    (published,) = read_samples(tmp_path)
    assert (sample.id, sample.prompt, sample.gold) == (published.id, published.prompt, published.gold)
    assert len(sample.messages()[0]["content"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, "must be 'yes' or 'no', found 'maybe'"),
        ({"category": "easy"}, "no category 'easy'; there are adversarial, popular, random"),
        ({"question_id": 2}, "each sample needs an id of its own.*'10000002'"),
        ({"question_id": "one"}, "the question_id must be a number, found 'one'"),
    ],
)
def test_wrong_records_are_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    first, second = rows("yes", "no")
    file = write_lines(tmp_path / "coco_pope_random.json", [first | change, second])
    with pytest.raises(DataError, match=message):
        read_samples(file)


def test_a_missing_key_is_told_with_its_row(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, "image": "0.jpg", "label": "no"}])
    with pytest.raises(DataError, match=r"row 0: has no 'text'"):
        read_samples(file)
    with pytest.raises(DataError, match="holds no samples"):
        read_samples(Path(__file__).parent)
