"""Benchmarks' files as they are published: parquet and JSON records checked on the way in, answers joined by id."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as parquet

from basalt.data.readers import DataError, ImageSource
from basalt.eval.benchmark import ReadImage, Sample

MAX_GAP = 0.01  # the share of missing, or of unknown, answers above which a score would mislead

T = TypeVar("T")


@dataclass(frozen=True)
class Gaps:
    """Where answers and samples do not meet: ids that no answer has, and ids of answers that no sample has."""

    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def read_parquet(path: Path, columns: Sequence[str], images: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a parquet file; an image column gives what reads its bytes later, or `None`.

    Images are the `{bytes, path}` structs of Hugging Face datasets.

    Raises:
        DataError: it is no parquet file, or lacks a column.
    """
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
    with file:
        found = file.schema_arrow.names
        if absent := [column for column in (*columns, *images) if column not in found]:
            raise DataError(f"{path} has no column {', '.join(map(repr, absent))}; it has {', '.join(found)}")
        # Of an image its path alone: enough to know that there is one, without reading the pictures.
        rows = file.read(columns=[*columns, *(f"{column}.path" for column in images)]).to_pylist()
    for number, row in enumerate(rows):
        for column in images:
            row[column] = None if row[column] is None else partial(_read_image, path, column, number)
    return rows


def require(record: Any, keys: Iterable[str], where: str) -> dict[str, Any]:
    """The record itself, if it is an object with these keys.

    Raises:
        DataError: it is not, or lacks one.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {type(record).__name__}")
    if absent := [key for key in keys if key not in record]:
        found = ", ".join(map(repr, list(record)[:20])) + (", …" if len(record) > 20 else "")
        raise DataError(f"{where}: has no {', '.join(map(repr, absent))}; it has {found or 'nothing'}")
    return record


def checked(samples: list[Sample], path: Path) -> list[Sample]:
    """The samples themselves, if there are any and each has an id of its own.

    Raises:
        DataError: there are none, or an id is empty or occurs twice.
    """
    if not samples:
        raise DataError(f"{path} holds no samples")
    if twice := [id for id, count in Counter(sample.id for sample in samples).items() if count > 1 or not id]:
        raise DataError(f"{path}: each sample needs an id of its own; {len(twice)} are not: {_some(twice)}")
    return samples


def image_in(source: ImageSource | None, name: str) -> ReadImage:
    """What reads one image of a source later.

    Raises (when it reads):
        DataError: there is no source, or no such image in it.
    """

    def read() -> bytes:
        if source is None:
            raise DataError(f"the image {name!r} is not in the benchmark's file: say in which folder or tar it is")
        return source.read(name)

    return read


def read_predictions(path: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """Answers by id: of records in lines or in a list, or of one object from id to answer.

    A record is ours (`id`, `prediction`), LLaVA's (`question_id`, `prompt`, `text`), or one of MMMU's raw outputs
    (`id`, `response`; its `answer` is the label). No other key is taken for an answer, so that a file of labels
    or of questions is not scored by mistake.

    Raises:
        DataError: a record is of no such form, or an id occurs twice.
    """
    return unique((answer_of(record, where) for record, where in prediction_records(path)), path)


def prediction_records(path: Path) -> Iterable[tuple[dict[str, Any], str]]:
    """The records of a file of answers, or of a folder of MMMU's raw outputs, each with where it stands."""
    files = sorted(path.glob("*/output.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: a folder of answers has a file SUBJECT/output.json for each subject")
    for file in files:
        records = read_json(file)
        if isinstance(records, dict):
            records = [{"id": id, "prediction": text} for id, text in records.items()]
        elif not isinstance(records, list):
            raise DataError(f"{file}: expected answers, found one {type(records).__name__}")
        for number, record in enumerate(records):
            where = f"{file}, row {number}"
            yield require(record, (), where), where


def answer_of(record: dict[str, Any], where: str) -> tuple[str, str]:
    """The id and the answer of one record.

    Raises:
        DataError: it is of none of the known forms.
    """
    forms = (("id", "prediction"), ("id", "response"), ("question_id", "text", "prompt"))
    for id, answer, *others in forms:
        if all(key in record for key in (id, answer, *others)):
            if not isinstance(record[answer], str):
                raise DataError(f"{where}: an answer is text, {answer!r} is {type(record[answer]).__name__}")
            return str(record[id]), record[answer]
    raise DataError(
        f"{where}: an answer needs 'id' and 'prediction', or LLaVA's 'question_id', 'prompt' and 'text'; "
        f"it has {', '.join(map(repr, record))}"
    )


def unique(pairs: Iterable[tuple[str, T]], path: Path) -> dict[str, T]:
    """The pairs as a dictionary.

    Raises:
        DataError: an id occurs twice.
    """
    found: dict[str, T] = {}
    for id, value in pairs:
        if id in found:
            raise DataError(f"{path}: {id!r} is answered twice; each id may occur once")
        found[id] = value
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds; of one with an object a line, whatever its suffix (as POPE's labels), the list of them.

    Raises:
        DataError: it is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines and path.suffix == ".jsonl":
        return []
    if not lines or not _is_object(lines[0][1]) or (len(lines) == 1 and path.suffix != ".jsonl"):
        return _decode(text, str(path))
    return [_decode(line, f"{path}, line {number}") for number, line in lines]


def read_rows(path: Path) -> list[Any]:
    """The records of a JSON file: those of a list, or one a line.

    Raises:
        DataError: it is no such file.
    """
    found = read_json(path)
    if isinstance(found, dict):
        return [found]
    if not isinstance(found, list):
        raise DataError(f"{path}: expected records, found one {type(found).__name__}")
    return found


def join(
    samples: Sequence[Sample], predictions: Mapping[str, T], *, max_gap: float = MAX_GAP, intersection: bool = False
) -> tuple[list[tuple[Sample, T | None]], Gaps]:
    """Samples with what was answered, by id, and where they do not meet.

    Args:
        max_gap: the share of samples that may have no answer (`None` here), and of answers that no sample has.
        intersection: take only samples with an answer, however few.

    Raises:
        DataError: more is missing than that, or nothing meets.
    """
    known = {sample.id for sample in samples}
    missing = tuple(sample.id for sample in samples if sample.id not in predictions)
    unknown = tuple(id for id in predictions if id not in known)
    if len(missing) == len(samples):
        raise DataError(f"no answer has the id of a sample: samples are {_some(known)}, answers {_some(predictions)}")
    if not intersection:
        for ids, all_of_them, problem in (
            (missing, samples, "samples have no answer"),
            (unknown, predictions, "answers have the id of no sample"),
        ):
            if len(ids) > max_gap * len(all_of_them):
                raise DataError(
                    f"{len(ids)} of {len(all_of_them)} {problem} ({_some(ids)}), more than {max_gap:.1%}: "
                    "the score would mislead. Answer them all, or ask for the intersection"
                )
    pairs = [(sample, predictions.get(sample.id)) for sample in samples]
    return [pair for pair in pairs if not intersection or pair[0].id in predictions], Gaps(missing, unknown)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error


def _some(ids: Iterable[str]) -> str:
    """The first few ids, for a message."""
    listed = sorted(ids)
    return ", ".join(map(repr, listed[:3])) + (", …" if len(listed) > 3 else "")


def _read_image(path: Path, column: str, row: int) -> bytes:
    """The bytes of one image of a parquet file."""
    with parquet.ParquetFile(path) as file:
        group = 0
        while row >= (rows := file.metadata.row_group(group).num_rows):
            group, row = group + 1, row - rows
    data = _image_column(path, column, group)[row].as_py()["bytes"]
    if data is None:
        raise DataError(f"{path}: {column!r} of a row holds no bytes: the pictures must be in the file")
    return data


@lru_cache(maxsize=8)
def _image_column(path: Path, column: str, group: int) -> Any:
    """A row group's pictures, kept while neighbours are read: a column cannot be decoded by the row."""
    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)
