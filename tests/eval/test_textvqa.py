from pathlib import Path
from typing import Any

import pytest

from basalt.data.readers import DataError
from basalt.eval.benchmark import OFFICIAL, STRICT
from basalt.eval.scoring import rescore
from basalt.eval.textvqa import read_samples
from tests.eval.published_files import picture, write_json, write_lines, write_parquet

ROW = {
    "question_id": 34602,
    "image_id": "003a",
    "question": "What is the Brand?",
    "answers": ["dakota"] * 3 + ["x"] * 7,
}
PROMPT = "What is the Brand?\nAnswer the question using a single word or phrase."


def published(path: Path, *rows: dict[str, Any]) -> Path:
    return write_json(path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})


def test_the_prompt_tells_what_was_read_where_it_is_known(tmp_path: Path) -> None:
    file = published(tmp_path, ROW)
    asked = "What is the Brand?\nReference OCR token: DAKOTA, 7.2\nAnswer the question using a single word or phrase."
    ocr = write_lines(tmp_path / "ocr.jsonl", [{"question_id": "003a", "text": asked, "image": "003a.jpg"}])
    told = ROW | {"ocr_tokens": ["DAKOTA", "7.2"], "image": picture()}
    (bare,), (read,) = read_samples(file), read_samples(file, ocr=ocr)
    (parquet,) = read_samples(write_parquet(tmp_path / "val.parquet", [told]))
    assert (bare.id, bare.prompt, bare.cluster) == ("34602", PROMPT, "003a")
    assert read.prompt == parquet.prompt == asked
    (empty,) = read_samples(write_parquet(tmp_path / "val.parquet", [told | {"ocr_tokens": []}]))
    assert empty.prompt == PROMPT.replace("\n", "\nReference OCR token: \n")
    with pytest.raises(DataError, match="no such question about the image '003a'"):
        read_samples(published(tmp_path, ROW | {"question": "Another?"}), ocr=ocr)
    write_lines(ocr, [{"question_id": "003a", "text": PROMPT}])
    with pytest.raises(DataError, match=r"row 0: has no line 'Reference OCR token:'"):
        read_samples(file, ocr=ocr)


def test_llavas_answers_are_joined_on_picture_and_question(tmp_path: Path) -> None:
    """Its `question_id` is the picture's: two questions about one picture have the same."""
    other = ROW | {"question_id": 34603, "question": "How many?", "answers": ["two"] * 10}
    file = published(tmp_path, ROW, other)
    ocr = "\nReference OCR token: DAKOTA\nAnswer the question using a single word or phrase."
    rows = [
        {"question_id": "003a", "prompt": f"how many?{ocr}", "text": "2"},
        {"question_id": "003a", "prompt": f"What is the brand?{ocr}", "text": "Dakota."},
    ]
    scores = rescore("textvqa", file, write_lines(tmp_path / "a.jsonl", rows))
    assert [one.verdicts[OFFICIAL].score for one in scores.scored] == [0.9, 1]
    assert [one.verdicts[STRICT].score for one in scores.scored] == [0.9, 0]
    assert scores.overall[OFFICIAL]["accuracy"] == pytest.approx(95)
    assert scores.differences() == {("processed", "unmatched"): 1}
    with pytest.raises(DataError, match="'34603' is answered twice"):
        rescore("textvqa", file, write_lines(tmp_path / "a.jsonl", [rows[0], *rows]))
    ours = write_lines(tmp_path / "o.jsonl", [{"id": "34603", "prediction": "two"}, {"id": "34602", "prediction": "x"}])
    assert rescore("textvqa", file, ours).overall[OFFICIAL]["accuracy"] == 100


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"answers": ["dakota"] * 9}, "9 answers; the score is defined for 10, and the test has none"),
        ({name: value for name, value in ROW.items() if name != "answers"}, "row 0: has no 'answers'"),
    ],
)
def test_wrong_records_are_told(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_samples(published(tmp_path, row))


def test_wrong_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no 'data'; it has 'rows'"):
        read_samples(write_json(tmp_path / "v.json", {"rows": []}))
    with pytest.raises(DataError, match="each sample needs an id of its own; 1 are not: '34602'"):
        read_samples(published(tmp_path, ROW, ROW))
    with pytest.raises(DataError, match="has no column 'ocr_tokens'"):
        read_samples(write_parquet(tmp_path / "val.parquet", [ROW | {"image": picture()}]))
