"""The registry: published versions of assistants, immutable, in the object store.

A version is addressed by the digest of its manifest. Its files lie under `versions/NAME/HEX/`, the manifest written
last: what can be found is whole, and publishing the same version again changes nothing.
"""

import json
import shutil
import tempfile
from pathlib import Path

from basalt.assistants import MANIFEST, Assistant, AssistantError, Manifest, load_assistant, sha256
from basalt.object_store import ObjectNotFound, ObjectStore


async def publish(store: ObjectStore, directory: Path) -> str:
    """Puts an assistant's directory into the registry; returns NAME@VERSION, the version its digest's hex.

    Raises:
        AssistantError: its files are missing or changed.
        StoreUnavailable: the object store is.
    """
    assistant = load_assistant(directory)
    version = assistant.version.removeprefix("sha256:")
    for relative in [*_files(assistant.manifest), MANIFEST]:
        await store.put_file(f"versions/{assistant.name}/{version}/{relative}", assistant.path(relative))
    return f"{assistant.name}@{version}"


async def pull(store: ObjectStore, name: str, version: str, models: Path) -> Assistant:
    """Brings a version into `models/NAME`, in the place of what was there, and checks it against its digests.

    Raises:
        AssistantError: there is no such version, or what is stored is not it.
        StoreUnavailable: the object store is.
    """
    prefix = f"versions/{name}/{version}"
    try:
        raw = await store.get(f"{prefix}/{MANIFEST}")
    except ObjectNotFound:
        raise AssistantError(f"the registry has no version {version} of {name!r}") from None
    if sha256(raw) != f"sha256:{version}":
        raise AssistantError(f"the manifest of {name}@{version} is not of that digest")
    models.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 (a command waits for it, no server)
    with tempfile.TemporaryDirectory(dir=models, prefix=".pulled-") as scratch:
        directory = Path(scratch) / name
        for relative in _files(Manifest.model_validate(json.loads(raw))):
            (directory / relative).parent.mkdir(parents=True, exist_ok=True)
            await store.get_file(f"{prefix}/{relative}", directory / relative)
        (directory / MANIFEST).write_bytes(raw)
        load_assistant(directory)
        shutil.rmtree(models / name, ignore_errors=True)
        directory.rename(models / name)
    return load_assistant(models / name)


def _files(manifest: Manifest) -> list[str]:
    """All of a version's files but the manifest."""
    adapter = ["adapter_config.json", "adapter_model.safetensors"] if manifest.lora else []
    lora = [f"{manifest.lora.dir}/{name}" for name in adapter] if manifest.lora else []
    return [manifest.projector.file, manifest.chat_template, *lora]
