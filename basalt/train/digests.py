"""What a run learned from and with, by digest: for its lineage and its record."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from basalt.assistants import TowerSpec, sha256
from basalt.data.readers import DataError, find_shards
from basalt.model.vision_encoder import efficientnet_lite_weights
from basalt.train.checkpoints import file_digest


def rows_digest(rows: Path) -> str | None:
    """Of its files; None where they are gone by now."""
    try:
        return _files_digest(find_shards(rows))
    except DataError:
        return None


def tower_digest(spec: TowerSpec) -> str | None:
    if spec.kind == "efficientnet-lite":
        return _files_digest([efficientnet_lite_weights()])
    return weights_digest(Path(spec.id))


def weights_digest(model: Path) -> str | None:
    """Of a model's weights, given by its directory or hub id; None where they are not on this machine."""
    try:
        directory = model if model.is_dir() else Path(snapshot_download(str(model), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return _files_digest(sorted(directory.glob("*.safetensors")))


def _files_digest(files: list[Path]) -> str | None:
    """Of a file its own; of several that of their digests, in order."""
    digests = [f"sha256:{file_digest(file)}" for file in files]
    return digests[0] if len(digests) == 1 else sha256("\n".join(digests).encode()) if digests else None
