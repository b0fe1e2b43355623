"""Assistants on disk: a manifest beside the files it names, addressed by digest.

`models/NAME/manifest.json` describes one immutable version of one assistant. This module reads it
and checks it; it holds no tensors and imports no torch, so every service may use it.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MANIFEST = "manifest.json"


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

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    tower: TowerSpec
    projector: ProjectorSpec
    base_lm: BaseLMSpec
    lora: LoRASpec | None = None
    chat_template: str  # file name, Jinja; `<image>` marks where visual tokens go
    lineage: dict[str, object] = Field(default_factory=dict)


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
    expected = {manifest.projector.file: manifest.projector.digest}
    if manifest.lora:
        expected[f"{manifest.lora.dir}/adapter_model.safetensors"] = manifest.lora.digest
    for relative, digest in expected.items():
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


def sha256(data: bytes) -> str:
    """`sha256:` and the hex digest of `data`: the form of every digest and image id."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
