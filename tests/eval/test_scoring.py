"""Every parser on strange answers, and what official and strict scoring may differ by."""

import time
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from basalt.cli import app
from basalt.data.readers import DataError
from basalt.eval import letters, mmmu, pope, scienceqa, vqa
from basalt.eval.benchmark import EMPTY, MISSING, OFFICIAL, REFUSAL, STRICT, Rule, Sample, Scored
from basalt.eval.mm_vet import read_grade
from basalt.eval.scoring import BENCHMARKS, rescore
from tests.eval.published_files import write_json, write_lines
from tests.eval.strange_answers import PIECES, strange_answers

OPTIONS = ("a red car", "a blue car", "blue", "$7")
SAMPLES = {
    "mmmu choice": ("mmmu", Sample("1", "", ("B",), OPTIONS)),
    "mmmu number": ("mmmu", Sample("1", "", ("42", "7"))),
    "mmmu text": ("mmmu", Sample("1", "", ("blue car", "A"))),
    "scienceqa": ("scienceqa", Sample("1", "", ("B",), OPTIONS)),
    "pope yes": ("pope", Sample("1", "", ("yes",))),
    "pope no": ("pope", Sample("1", "", ("no",))),
    "textvqa": (
        "textvqa",
        Sample("1", "", ("dakota digital", "42", "2", "none", "yes", "don't", "7:30", "b", "b", "b")),
    ),
    "vqa": ("vqa", Sample("1", "", ("dakota digital", "42"))),
}

NOT_READ = {letters.AMBIGUOUS, letters.OUTSIDE, letters.UNREADABLE, EMPTY, REFUSAL}
READ = {letters.LETTER, letters.STATED, letters.LEADING, letters.BRACKETED, letters.OPTION}
# Why official and strict may differ on an answer: by which rules, and who gives the point.
EXPLAINED: dict[str, list[tuple[str, str, set[Rule], set[Rule]]]] = {
    "mmmu choice": [
        ("a draw hits or misses", "both", {mmmu.DRAWN}, READ | NOT_READ),
        ("of several letters or texts the last is taken", "both", {
            mmmu.LAST_BRACKETS, mmmu.LAST_SPACED, mmmu.LAST_CONTENT}, READ | NOT_READ),
        ("a part of the answer is taken for an option's text", "both", {mmmu.CONTENT}, READ | NOT_READ),
        ("a letter between blanks may be a word, as 'A'", "both", {mmmu.SPACED}, READ | NOT_READ),
        ("strictly another letter is named too, or is called the answer", "official", {mmmu.BRACKETS}, {
            letters.AMBIGUOUS, letters.STATED}),
    ],
    "mmmu number": [
        ("any of several numbers will do", "official", {mmmu.ONE_OF_NUMBERS}, {mmmu.SEVERAL, mmmu.CLAIM}),
        ("strictly more numbers are seen, or what is called the answer is none", "official", {mmmu.NUMBER}, {
            mmmu.SEVERAL, mmmu.CLAIM}),
        ("a number with marks or letters at it is read strictly alone", "strict", {mmmu.NO_MATCH}, {mmmu.CLAIM}),
    ],
    "mmmu text": [
        ("the gold text may be part of another word", "official", {mmmu.PART}, {mmmu.CLAIM, REFUSAL, EMPTY}),
        ("what follows a word as 'is' need not be the answer", "official", {mmmu.EQUAL}, {mmmu.CLAIM}),
        ("strictly the marks round an answer are no matter", "strict", {mmmu.NO_MATCH}, {mmmu.CLAIM}),
    ],
    "scienceqa": [
        ("only three forms are read officially", "strict", {scienceqa.FAILED}, READ),
        ("strictly another letter is named too, or is called the answer", "both", {
            scienceqa.LEADING, scienceqa.PHRASE}, {letters.AMBIGUOUS, letters.STATED}),
    ],
    "pope yes": [
        ("what is not no is yes", "official", {pope.OTHERWISE}, {
            pope.NEITHER, pope.BOTH, pope.ONE_WORD, EMPTY, REFUSAL}),
        ("no stands after a full stop, or commas within a word are dropped", "official", {pope.POSITIVE}, {
            pope.BOTH, pope.NEITHER}),
        ("'not' is no", "strict", {pope.NEGATIVE}, {pope.ONE_WORD}),
    ],
    "pope no": [
        ("what is not no is yes", "strict", {pope.OTHERWISE}, {pope.ONE_WORD}),
        ("'not' is no, and so is no beside yes", "official", {pope.NEGATIVE}, {
            pope.NEITHER, pope.BOTH, pope.ONE_WORD, REFUSAL}),
    ],
    "textvqa": [("the processing changes words and marks", "both", {vqa.PROCESSED}, {
        vqa.UNMATCHED, vqa.AS_GIVEN, EMPTY, REFUSAL})],
}  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> list[str]:
    return list(strange_answers())


@pytest.mark.parametrize("name", SAMPLES)
def test_twenty_thousand_strange_answers_crash_nothing_and_score_the_same_twice(name: str, answers: list[str]) -> None:
    benchmark, sample = SAMPLES[name]
    score = BENCHMARKS[benchmark].scorer([sample])
    assert len(answers) == 20_000
    first = [score(sample, answer) for answer in answers]
    assert [score(sample, answer) for answer in answers] == first
    assert all(0 <= verdict.score <= 1 for verdicts in first for verdict in verdicts.values())
    assert len({verdict.rule for verdicts in first for verdict in verdicts.values()}) > 3


@pytest.mark.parametrize("name", EXPLAINED)
def test_every_difference_of_official_and_strict_is_explained(name: str, answers: list[str]) -> None:
    benchmark, sample = SAMPLES[name]
    score, met, unexplained = BENCHMARKS[benchmark].scorer([sample]), Counter(), {}
    for answer in answers:
        verdicts = score(sample, answer)
        official, strict = verdicts[OFFICIAL], verdicts[STRICT]
        assert (Scored(sample, answer, verdicts).difference is None) == (official.score == strict.score)
        if official.score == strict.score:
            continue
        better = "official" if official.score > strict.score else "strict"
        for why, side, official_rules, strict_rules in EXPLAINED[name]:
            if side in ("both", better) and official.rule in official_rules and strict.rule in strict_rules:
                met[why] += 1
                break
        else:
            unexplained[better, official.rule.name, strict.rule.name] = answer
    assert not unexplained
    assert met.keys() == {why for why, *_ in EXPLAINED[name]}


def test_grades_are_numbers_from_0_to_1_or_none(answers: list[str]) -> None:
    grades = [read_grade(answer) for answer in answers]
    assert all(grade is None or 0 <= grade <= 1 for grade in grades)
    assert grades.count(None) not in (0, len(grades))


@pytest.mark.parametrize("name", SAMPLES)
def test_no_answer_takes_long_to_read(name: str) -> None:
    """30,000 characters of anything repeated, before and after what a pattern may wait for."""
    benchmark, sample = SAMPLES[name]
    score = BENCHMARKS[benchmark].scorer([sample])
    repeated = [*PIECES, "9", "1.", "111,", "e9", "answer ", "answer is ", "choice", "A. ", "I ", "\x1c", "no,", "-"]
    for piece in repeated:
        for head, tail in (("", ""), ("answer", "x"), ("9", "e")):
            answer = head + piece * (30_000 // len(piece)) + tail
            began = time.process_time()
            score(sample, answer)
            assert time.process_time() - began < 0.5, (head, piece, tail)


def write_questions(folder: Path, count: int) -> Path:
    rows = [{"id": str(n), "image": "a.png", "question": "?", "answer": f"a{n}"} for n in range(count)]
    return write_json(folder / "q.json", rows)


def test_what_was_not_answered_is_wrong_and_named(tmp_path: Path) -> None:
    data = write_questions(tmp_path, 200)
    said = write_lines(tmp_path / "a.jsonl", [{"id": str(n), "prediction": f"a{n}"} for n in range(198)])
    scores = rescore("vqa", data, said)
    assert scores.overall["exact"]["accuracy"] == 99
    assert scores.rules("exact")[MISSING] == 2
    assert scores.as_json()["missing"] == ["198", "199"]
    assert rescore("vqa", data, said, intersection=True).overall["exact"]["accuracy"] == 100
    with pytest.raises(DataError, match="no benchmark 'vqav3'; there are mmmu, mm-vet"):
        rescore("vqav3", data, said)


def test_the_command_scores_and_tells_what_is_wrong(tmp_path: Path) -> None:
    data = write_questions(tmp_path, 4)
    said = write_json(tmp_path / "a.json", {"0": "a0", "1": "", "2": "x", "3": "I cannot see it"})
    command = ["eval", "score", "vqa", "--data", str(data), "--predictions", str(said)]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "25.0" in shown.output and "refusal" in shown.output
    write_json(said, {"0": "a0"})
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and "3 of 4 samples have no answer" in refused.output
    assert CliRunner().invoke(app, [*command, "--intersection"]).exit_code == 0
    lost = CliRunner().invoke(app, [*command[:-1], str(tmp_path)])
    assert lost.exit_code == 1 and "SUBJECT/output.json" in lost.output
