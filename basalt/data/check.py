"""`basalt data check`: reads everything that a recipe trains on and tells what training would make of it.

The rows go the way they go in training, through the same functions, so what is counted here is what a run would
count. Nothing is trained and no torch is imported, unless steps are to be measured.
"""

import hashlib
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import AutoTokenizer

from basalt.data.grouping import Group, Pass, deal, group_samples, pass_length
from basalt.data.images import ImageError, decode_image
from basalt.data.preprocess import TEMPLATES, Tokenizer
from basalt.data.readers import DataError, DataSet, Row
from basalt.data.selection import TOO_LONG, UNLABELLED, Counts, learnable, usable, with_images
from basalt.data.tokenising import tokenised
from basalt.model.precision import dtype_of
from basalt.train import parallel
from basalt.train.features import bytes_of_one
from basalt.train.recipe import DataSource, Recipe, RecipeError

CHUNK = 256  # images read and decoded together
MASTER_BYTES = 4 + 4 + 8  # a trained weight's float32 master, its gradient and AdamW's moments


class DroppedRows(BaseModel):
    """Rows dropped for one reason, with the first few of them."""

    reason: str
    count: int
    examples: list[str]


class ImageCounts(BaseModel):
    distinct: int
    missing: int
    broken: int | None  # cannot be decoded; None where that was not tried


class Lengths(BaseModel):
    """Of all usable conversations in tokens, visual ones included."""

    median: int
    p95: int
    longest: int


class SourceReport(BaseModel):
    """What is in one data set."""

    path: str
    held_out: bool
    rows: int = 0
    usable: int = 0
    dropped: list[DroppedRows] = []
    too_long: int = 0  # these two are among the dropped
    unlabelled: int = 0
    images: ImageCounts = ImageCounts(distinct=0, missing=0, broken=None)
    tokens: Lengths | None = None
    duplicates: int = 0  # rows that say of the same images what an earlier one does
    problem: str | None = None  # why training would stop


class EpochReport(BaseModel):
    """The data as training would deal it, once through."""

    groups: int
    packed_rows: int
    padding: float  # share of all positions that are run through the model
    passes: int
    steps: int
    total_steps: int  # of the recipe
    epochs: float  # that they make
    tokens: int
    supervised_tokens: int


class MemoryEstimate(BaseModel):
    """Bytes by arithmetic, not measured. Activations are not among them: only running the model tells."""

    base_lm: int
    trained: int  # weights, gradients, float32 masters and AdamW's moments of projector and LoRA
    features_on_disk: int  # the cache of tower features


class Measured(BaseModel):
    """Real steps of training on this machine."""

    seconds_per_step: float
    seconds: float  # of all the recipe's steps, without tower features and grounding
    tokens_per_second: float  # without padding
    peak_memory: int  # bytes, of the whole process


class Report(BaseModel):
    """What training on a recipe's data would meet."""

    sources: list[SourceReport]
    epoch: EpochReport | None = None  # None without a usable row
    memory: MemoryEstimate | None = None  # None where the base LM's weights are not in a local directory
    measured: Measured | None = None
    problems: list[str] = []  # why training would stop


def check_recipe(
    recipe: Recipe, *, images: bool = True, measure: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Report:
    """Reads every data set of a recipe.

    Args:
        images: decode every image; otherwise see only whether it is there. Duplicates are found by the images'
            bytes or, otherwise, by their names.
        measure: run a few real steps.
        tell: is told what is being read.

    Raises:
        RecipeError: the base LM has no tokenizer.
    """
    tokenizer = _tokenizer(recipe)
    sources = [(source, False) for source in recipe.data]
    sources += [(recipe.held_out, True)] if recipe.held_out else []
    checked: list[tuple[SourceReport, list[Group]]] = []
    for source, held_out in sources:
        tell(f"reading {source.rows}")
        report = SourceReport(path=str(source.rows), held_out=held_out)
        checked.append((report, _check_source(source, recipe, tokenizer, images, report)))
    reports = [report for report, _ in checked]
    found = Report(sources=reports, problems=[report.problem for report in reports if report.problem])
    trained = zip(checked, recipe.data, strict=False)  # without the held-out rows, which come last
    weighted = [(groups, source.weight) for (_, groups), source in trained]
    passes = deal(weighted, recipe.row_length, recipe.rows_per_pass, random.Random(f"{recipe.seed}/0"))
    if passes:
        found.epoch = _epoch(passes, recipe)
    found.memory = _memory(recipe, sum(report.images.distinct - report.images.missing for report in reports))
    if measure and passes and not found.problems:
        from basalt.train.measure import measure_steps

        tell("running a few steps")
        found.measured = measure_steps(recipe, passes)
    return found


def _tokenizer(recipe: Recipe) -> Tokenizer:
    template = TEMPLATES / recipe.chat_template
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.base_lm)
        return Tokenizer(tokenizer, template.read_text(), recipe.image_token_id, recipe.tower.tokens)
    except (OSError, ValueError) as error:
        raise RecipeError(f"base_lm and chat_template: {error}") from error


def _check_source(
    source: DataSource, recipe: Recipe, tokenizer: Tokenizer, decode: bool, report: SourceReport
) -> list[Group]:
    """Fills the report; returns the groups that would be trained on."""
    counts = Counts(source.rows)
    try:
        data = DataSet(source.rows, source.images)
        rows = usable(data.rows(source.prompts), counts)
        if source.boxes is not None and not source.boxes.is_file():
            raise DataError(f"{source.boxes}: there is no such file of boxes")
    except DataError as error:
        report.problem = str(error)
        return []
    conversations = list(tokenised(rows, tokenizer))
    samples = learnable(conversations, recipe.row_length, counts)
    names = sorted({name for row in rows for name in row.images})
    report.images, broken, contents = _check_images(data, names, decode)
    samples = with_images(samples, broken, counts)
    report.rows, report.usable = counts.rows, len(samples)
    report.dropped = [
        DroppedRows(reason=reason, count=lost.count, examples=lost.examples) for reason, lost in counts.dropped.items()
    ]
    report.too_long, report.unlabelled = counts.count(TOO_LONG), counts.count(UNLABELLED)
    report.tokens = _lengths([len(sample.ids) for _, sample in conversations])
    report.duplicates = len(rows) - len({_fingerprint(row, contents) for row in rows})
    report.problem = counts.problem()
    return group_samples(((row.images, sample) for row, sample in samples), recipe.row_length, recipe.image_token_id)


def _check_images(
    data: DataSet, names: list[str], decode: bool
) -> tuple[ImageCounts, dict[str, str], dict[str, bytes]]:
    """Counts the images; also name → why it is broken, and name → digest of its bytes where they were read."""
    broken: dict[str, str] = {}
    missing: set[str] = set()
    contents: dict[str, bytes] = {}
    for name in names:
        try:
            data.size(name)
        except DataError as error:
            broken[name] = str(error)
            missing.add(name)

    def read(name: str) -> None:
        try:
            held = data.read(name)
            contents[name] = hashlib.sha256(held).digest()
            decode_image(held)
        except (DataError, ImageError) as error:
            broken[name] = str(error)

    if decode:
        there = [name for name in names if name not in missing]
        with ThreadPoolExecutor(2) as pool:
            for start in range(0, len(there), CHUNK):
                list(pool.map(read, there[start : start + CHUNK]))
    found = ImageCounts(
        distinct=len(names), missing=len(missing), broken=len(broken) - len(missing) if decode else None
    )
    return found, broken, contents


def _fingerprint(row: Row, contents: dict[str, bytes]) -> bytes:
    shown = [contents[name].hex() if name in contents else name for name in row.images]
    return hashlib.sha256(json.dumps([shown, row.messages]).encode()).digest()


def _lengths(lengths: list[int]) -> Lengths | None:
    if not lengths:
        return None
    ordered = sorted(lengths)
    return Lengths(median=ordered[len(ordered) // 2], p95=ordered[len(ordered) * 95 // 100], longest=ordered[-1])


def _epoch(passes: list[Pass], recipe: Recipe) -> EpochReport:
    groups = [group for rows in passes for row in rows for group in row]
    tokens = sum(map(len, groups))
    positions = sum(len(rows) * pass_length(rows, recipe.row_length) for rows in passes)
    steps = max(len(passes) // recipe.passes_per_step, 1)
    return EpochReport(
        groups=len(groups),
        packed_rows=sum(map(len, passes)),
        padding=1 - tokens / positions,
        passes=len(passes),
        steps=steps,
        total_steps=recipe.total_steps(steps),
        epochs=recipe.total_steps(steps) / steps,
        tokens=tokens,
        supervised_tokens=sum(group.supervised() for group in groups),
    )


def _memory(recipe: Recipe, images: int) -> MemoryEstimate | None:
    shapes = _weight_shapes(recipe.base_lm)
    if not shapes:
        return None
    lm_dim = json.loads((recipe.base_lm / "config.json").read_text())["hidden_size"]
    hidden, width = recipe.projector_hidden, recipe.tower.width
    trained = (width + 1) * hidden + (hidden + 1) * lm_dim
    if recipe.lora is not None:  # on all linear layers but the head, A [rank, in] and B [out, rank]
        linear = [shape for name, shape in shapes.items() if name.endswith("_proj.weight")]
        trained += recipe.lora.rank * sum(map(sum, linear))
    size = dtype_of(recipe.dtype, parallel.device()).itemsize
    return MemoryEstimate(
        base_lm=size * sum(map(prod, shapes.values())),
        trained=(2 * size + MASTER_BYTES) * trained,
        features_on_disk=images * bytes_of_one(recipe.tower),
    )


def _weight_shapes(directory: Path) -> dict[str, list[int]]:
    """Name → shape of the weights in a directory's safetensors files, by their headers alone."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes
