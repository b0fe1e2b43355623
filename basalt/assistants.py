"""Assistants on disk: a manifest beside the files it names, addressed by digest.

`models/NAME/manifest.json` describes one immutable version of one assistant. This module reads it
and checks it; it holds no tensors and imports no torch, so every service may use it.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MANIFEST = "manifest.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft names them

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
# No segment begins with a dot, so that none leads out of the assistant's directory.
PartPath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$")]


class AssistantError(ValueError):
    """An assistant's files are missing, changed or do not fit together."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TowerSpec(_Spec):
    """The frozen vision encoder and how its pixels are made."""

    kind: Literal["siglip", "clip", "efficientnet-lite"]
    id: str  # "efficientnet-lite2", or a transformers model id or directory
    image_size: int = Field(gt=0)  # pixels, of the square the tower sees
    tokens: int = Field(gt=0)  # patch features per image
    width: int = Field(gt=0)  # tower_dim
    fit: Literal["resize", "pad"]  # how an image becomes that square
    coordinates: bool = False  # the last channels tell a token's row and column: a convolutional tower knows neither


class ProjectorSpec(_Spec):
    """The 2-layer MLP: tower_dim → hidden → lm_dim."""

    file: str
    digest: str
    hidden: int = Field(gt=0)


class BaseLMSpec(_Spec):
    id: str  # "smollm2-135m-instruct", or a transformers model id or directory
    lm_dim: int = Field(gt=0)
    context: int = Field(gt=0)  # tokens
    image_token_id: int = Field(ge=0)  # stands where visual tokens go; one that its training never used


class LoRASpec(_Spec):
    dir: str
    digest: str  # of adapter_model.safetensors
    rank: int = Field(gt=0)


class Manifest(_Spec):
    """One version of an assistant. Free-form `lineage` tells recipe, data, terms and measured quality."""

    name: str = Field(pattern=NAME)
    tower: TowerSpec
    projector: ProjectorSpec
    base_lm: BaseLMSpec
    lora: LoRASpec | None = None
    chat_template: str  # file name, Jinja; `<image>` marks where visual tokens go
    parts: dict[PartPath, Digest] = Field(default_factory=dict)  # every file of the version
    lineage: dict[str, object] = Field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """The files that serving reads, beside the manifest."""
        lora = [f"{self.lora.dir}/{name}" for name in (ADAPTER, ADAPTER_CONFIG)] if self.lora else []
        return [self.projector.file, *lora, self.chat_template]

    @property
    def digests(self) -> dict[str, str]:
        """The files named by digest: all, or only the weights where the manifest is older than `parts`."""
        weights = {self.projector.file: self.projector.digest}
        if self.lora:
            weights[f"{self.lora.dir}/{ADAPTER}"] = self.lora.digest
        return self.parts | weights


class Assistant:
    """A manifest together with the directory that holds its files."""

    def __init__(self, directory: Path, manifest: Manifest, version: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self.version = version  # sha256:… of the manifest's bytes

    @property
    def name(self) -> str:
        return self.manifest.name

    def path(self, relative: str) -> Path:
        return self.directory / relative


def load_assistant(directory: Path) -> Assistant:
    """Reads one assistant and checks its files against their digests.

    Raises:
        AssistantError: the manifest is missing or malformed, or a file is missing or changed.
    """
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = Manifest.model_validate(json.loads(raw))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise AssistantError(
            f"{path} is of another version of Basalt, or damaged: {field}: {problem['msg']}; publish the assistant anew"
        ) from error
    except FileNotFoundError:
        raise AssistantError(f"{directory} holds no {MANIFEST}: point at an assistant's directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AssistantError(f"{path} is not a valid manifest: {error}") from error
    assistant = Assistant(directory, manifest, sha256(raw))
    for relative, digest in manifest.digests.items():
        file = assistant.path(relative)
        if not file.is_file():
            raise AssistantError(f"{manifest.name}: {file} is missing")
        found = sha256(file.read_bytes())
        if found != digest:
            raise AssistantError(f"{manifest.name}: {file} has digest {found}, its manifest says {digest}")
    return assistant


def load_assistants(root: Path) -> dict[str, Assistant]:
    """Every assistant under `root`, by name."""
    found = [load_assistant(path.parent) for path in sorted(root.glob(f"*/{MANIFEST}"))]
    assistants = {assistant.name: assistant for assistant in found}
    if len(assistants) != len(found):
        names = [assistant.name for assistant in found]
        raise AssistantError(f"two assistants under {root} share a name: {sorted(names)}")
    return assistants


def seal(directory: Path, manifest: Manifest) -> Assistant:
    """Writes the manifest of a directory's files, each named in it by digest."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    parts = {file.relative_to(directory).as_posix(): sha256(file.read_bytes()) for file in files}
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for its owner alone
    sealed = manifest.model_copy(update={"parts": parts})
    (directory / MANIFEST).write_text(sealed.model_dump_json(indent=2) + "\n")
    return load_assistant(directory)


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `directory` when the block ends well, and vanishes when it does not.

    Raises:
        AssistantError: what is there is no assistant.
    """
    if directory.exists() and not (directory / MANIFEST).is_file():
        raise AssistantError(f"{directory} is in the way: it is there and holds no assistant; name another place")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        if directory.exists():
            directory.rename(Path(scratch) / "old")
        new.rename(directory)


def sha256(data: bytes) -> str:
    """`sha256:` and the hex digest of `data`: the form of every digest and image id."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
