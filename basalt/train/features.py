"""Tower features computed once: the tower is frozen, so training need not run it again each epoch.

A cache is one file of bf16 `[images, tokens, width]`, memory-mapped, and an index of the image names.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from basalt.assistants import TowerSpec, sha256
from basalt.data.images import ImageError, decode_image
from basalt.data.readers import DataError, Images
from basalt.model.vision_encoder import load_vision_encoder


class FeatureCache:
    """Features of a data set's images by name."""

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / "index.json").read_text())
        self.spec = TowerSpec.model_validate(index["tower"])
        self.rows: dict[str, int] = index["rows"]
        self.broken: dict[str, str] = index["broken"]  # image name → why
        elements = len(self.rows) * self.spec.tokens * self.spec.width
        flat = torch.from_file(str(directory / "features.bf16"), size=elements, dtype=torch.bfloat16)
        self._features = flat.view(len(self.rows), self.spec.tokens, self.spec.width)

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> Tensor:
        """`[tokens, width]`, bf16."""
        return self._features[self.rows[name]]


def cached_features(spec: TowerSpec, source: Images, names: list[str], root: Path, *, batch: int = 32) -> FeatureCache:
    """Opens the cache for these images under `root`, computing it first where it is not there.

    Known again by the tower and the images' names and sizes. An image that is missing or cannot be decoded is left
    out and named in `broken`; nothing takes its place.
    """
    images = [(name, _size(source, name)) for name in sorted(set(names))]
    key = sha256(json.dumps([spec.model_dump(), images]).encode())[7:23]
    directory = root / f"{source.path.stem}-{key}"
    if not (directory / "index.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        _compute(spec, source, [name for name, _ in images], directory, batch)
    return FeatureCache(directory)


def _size(source: Images, name: str) -> int | None:
    try:
        return source.size(name)
    except DataError:
        return None


def _compute(spec: TowerSpec, source: Images, names: list[str], directory: Path, batch: int) -> None:
    tower = load_vision_encoder(spec).to(torch.bfloat16)
    rows: dict[str, int] = {}
    broken: dict[str, str] = {}

    def pixels(name: str) -> Tensor | str:
        try:
            return tower.preprocess(decode_image(source.read(name)))
        except (ImageError, ValueError) as error:
            return str(error)

    def batches() -> Iterator[tuple[list[str], list[Tensor | str]]]:
        with ThreadPoolExecutor(2) as pool:
            for start in range(0, len(names), batch):
                group = names[start : start + batch]
                yield group, list(pool.map(pixels, group))

    with (directory / "features.bf16").open("wb") as file:
        for group, decoded in batches():
            good = [(name, item) for name, item in zip(group, decoded, strict=True) if isinstance(item, Tensor)]
            broken.update((name, item) for name, item in zip(group, decoded, strict=True) if isinstance(item, str))
            if good:
                features = tower(torch.stack([item for _, item in good])).to(torch.bfloat16).contiguous()
                file.write(features.view(torch.int16).numpy().tobytes())
            for name, _ in good:
                rows[name] = len(rows)
    (directory / "index.json").write_text(json.dumps({"tower": spec.model_dump(), "rows": rows, "broken": broken}))
