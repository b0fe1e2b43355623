"""The frozen tower's features: computed once and kept, as its images come again, or each time, where they do not fit.

A cache is one file of `[images, tokens, width]`, memory-mapped, and an index of the image names. Features are bf16
whatever training computes in: the rounding is far below what tells two images apart, and half the bytes are written,
kept and read again. The first process that needs a cache makes it, others wait. While it is made, `BEGUN` tells how
far it is: who is stopped or killed goes on from there.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from basalt.assistants import TowerSpec, sha256
from basalt.data.images import ImageError, decode_image
from basalt.data.readers import DataError, Images
from basalt.data.selection import MAX_DROPPED
from basalt.model.precision import name_of
from basalt.model.vision_encoder import load_vision_encoder
from basalt.train import parallel
from basalt.train.alone import alone
from basalt.train.said import log
from basalt.train.stop import Stop, Stopped, never

DECODERS = 8  # threads that decode images
BATCH = 32  # images that the tower sees together
INDEX, BEGUN, FEATURES = "index.json", "begun.json", "features"  # files of a cache
MARK_EVERY = 16  # batches
PRECISION = torch.bfloat16  # of features, kept or not

Tell = Callable[[int], None]  # is told how many images were seen


def untold(_: int) -> None:
    pass


class FeatureCache:
    """Features of a data set's images by name, read from a file."""

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        spec = TowerSpec.model_validate(index["tower"])
        self.rows: dict[str, int] = index["rows"]
        self.broken: dict[str, str] = index["broken"]  # image name → why
        shape = (len(self.rows), spec.tokens, spec.width)
        # Shared with the file: a private mapping, which may be written to, is refused where it is larger than memory.
        file, elements = str(directory / FEATURES), math.prod(shape)
        self._features = torch.from_file(file, shared=True, size=elements, dtype=PRECISION).view(shape)

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> Tensor:
        """`[tokens, width]`, bf16."""
        return self._features[self.rows[name]]

    def of(self, names: list[str]) -> dict[str, Tensor]:
        """`[tokens, width]` each."""
        return {name: self[name] for name in names}


class Tower:
    """The tower over one data set's images, on the device that trains, computing in `dtype`."""

    def __init__(self, spec: TowerSpec, source: Images, dtype: torch.dtype) -> None:
        self._encoder = load_vision_encoder(spec).to(parallel.device(), dtype)
        self._source = source
        self._pool = ThreadPoolExecutor(DECODERS)

    def see(self, names: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Features `[tokens, width]`, bf16, by image name, and why those that have none cannot be decoded."""
        pixels = dict(zip(names, self._pool.map(self._pixels, names), strict=True))
        good = {name: item for name, item in pixels.items() if isinstance(item, Tensor)}
        broken = {name: item for name, item in pixels.items() if isinstance(item, str)}
        stacks = [torch.stack(list(good.values())[at : at + BATCH]) for at in range(0, len(good), BATCH)]
        features = [row for stack in stacks for row in self._encoder(stack).to(PRECISION)]
        return dict(zip(good, features, strict=True)), broken

    def _pixels(self, name: str) -> Tensor | str:
        try:
            return self._encoder.preprocess(decode_image(self._source.read(name)))
        except (ImageError, ValueError) as error:
            return str(error)


class LiveFeatures:
    """Features computed each time they are asked for.

    Attributes:
        rows: the names of the images, those found broken on the way left out.
        broken: image name → why it is not there or, as far as it was tried, cannot be decoded.
    """

    def __init__(self, spec: TowerSpec, source: Images, names: list[str], dtype: torch.dtype) -> None:
        sizes = {name: _size(source, name) for name in sorted(set(names))}
        self.rows = dict.fromkeys(name for name, size in sizes.items() if size is not None)
        self.broken = {name: f"{source.path} holds no image {name!r}" for name, size in sizes.items() if size is None}
        self._path, self._tower = source.path, Tower(spec, source, dtype)

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> Tensor:
        return self.of([name])[name]

    def of(self, names: list[str]) -> dict[str, Tensor]:
        """`[tokens, width]` each; one that cannot be decoded is left out.

        Raises:
            DataError: too many cannot be.
        """
        features, broken = self._tower.see([name for name in names if name not in self.broken])
        for name, why in broken.items():
            self.broken[name] = why
            del self.rows[name]
            if len(self.broken) > MAX_DROPPED * (len(self.rows) + len(self.broken)):
                raise DataError(f"{self._path}: {len(self.broken)} images are broken, {name} the last: {why}")
        return features


def worth_keeping(
    spec: TowerSpec, source: Images, names: list[str], root: Path, dtype: torch.dtype, uses: float
) -> bool:
    """Whether features fit half of the disk that is free, and are needed more than once; or are there already, be it in
    part. Says so, and why.

    Args:
        uses: how often the run needs each.
    """
    count = len(set(names))
    size = count * bytes_of_one(spec)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    begun = (_cache_of(spec, source, names, root, dtype) / FEATURES).is_file()  # by an earlier run, or beside this
    keep = begun or (size <= free / 2 and uses > 1)
    why = f"{size / 2**30:.1f} GiB of {free / 2**30:.0f} GiB free, each needed {uses:.3g} times"
    why = "some are there already" if begun else why
    log.info(f"{source.path.name}: features of {count} images {'kept' if keep else 'computed each time'} ({why})")
    return keep


def cached_features(
    spec: TowerSpec,
    source: Images,
    names: list[str],
    root: Path,
    dtype: torch.dtype = torch.float32,
    stop: Stop = never,
    tell: Tell = untold,
) -> FeatureCache:
    """Opens the cache for these images under `root`, computing it first where it is not there.

    Known again by the tower and the images' names and sizes. An image that is missing or cannot be decoded is left
    out and named in `broken`; nothing takes its place.

    Raises:
        Stopped: `stop` said so; asked again, it goes on from there.
    """
    directory = _cache_of(spec, source, names, root, dtype)
    if not (directory / INDEX).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with alone(directory, stop):
            if not (directory / INDEX).is_file():  # nor by who was waited for
                tower, of_one = Tower(spec, source, dtype), bytes_of_one(spec)
                rows, broken = _compute(tower, sorted(set(names)), directory, of_one, stop, tell)
                _write_whole(directory / INDEX, {"tower": spec.model_dump(), "rows": rows, "broken": broken})
    return FeatureCache(directory)


def _cache_of(spec: TowerSpec, source: Images, names: list[str], root: Path, dtype: torch.dtype) -> Path:
    """Where the features of these images are kept."""
    images = [(name, _size(source, name)) for name in sorted(set(names))]
    about = {"tower": spec.model_dump(), "computed in": name_of(dtype), "kept in": name_of(PRECISION)}
    return root / f"{source.path.stem}-{sha256(json.dumps([about, images]).encode())[7:23]}"


def bytes_of_one(spec: TowerSpec) -> int:
    """What the features of an image take."""
    return spec.tokens * spec.width * PRECISION.itemsize


def _size(source: Images, name: str) -> int | None:
    try:
        return source.size(name)
    except DataError:
        return None


def _compute(
    tower: Tower, names: list[str], directory: Path, of_one: int, stop: Stop, tell: Tell
) -> tuple[dict[str, int], dict[str, str]]:
    """Writes the features of all images that can be decoded; returns their rows, and why the others cannot."""
    begun = directory / BEGUN
    told = json.loads(begun.read_text()) if begun.is_file() else {"rows": {}, "broken": {}}
    rows: dict[str, int] = told["rows"]
    broken: dict[str, str] = told["broken"]
    (directory / FEATURES).touch()
    with (directory / FEATURES).open("r+b") as file:
        file.truncate(len(rows) * of_one)  # what was written since it was last told
        file.seek(0, os.SEEK_END)
        starts = range(len(rows) + len(broken), len(names), BATCH)
        for number, at in enumerate(starts, 1):
            features, not_seen = tower.see(names[at : at + BATCH])
            broken |= not_seen
            for name, feature in features.items():
                file.write(feature.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                rows[name] = len(rows)
            tell(len(rows) + len(broken))
            stopping = stop()
            if stopping or number % MARK_EVERY == 0:
                file.flush()
                os.fsync(file.fileno())
                _write_whole(begun, {"rows": rows, "broken": broken})
            if stopping:
                raise Stopped(f"stopped at {at + BATCH} of {len(names)} images; started again, it goes on from there")
    begun.unlink(missing_ok=True)
    return rows, broken


def _write_whole(path: Path, value: object) -> None:
    """Whoever reads finds all of it or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)
