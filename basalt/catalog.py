"""The versions a service can serve: those of its models directory, and any of the registry, brought when asked for.

Whatever is served is served from a directory of its own under `versions/HEX`, which never changes: a newer version put
into the models directory takes no file away from under requests for the one before.
"""

import asyncio
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from basalt import registry
from basalt.assistants import Assistant, AssistantError, load_assistant, load_assistants
from basalt.flights import SingleFlight
from basalt.object_store import InvalidKey, ObjectStore


class UnknownAssistant(Exception):
    """There is no such assistant or version here or in the registry; the message names those there are."""


class Catalog:
    """Assistants by reference: `NAME`, as the models directory has it, or `NAME@HEX`, one version exactly.

    Args:
        models: the directory of assistants that are served from the start.
        versions: where each version gets its directory; services of one machine may share it.
        store: holds the registry.

    Raises:
        AssistantError: files of an assistant of the models directory are missing or changed.
    """

    def __init__(self, models: Path, versions: Path, store: ObjectStore) -> None:
        self._models = models
        self._versions = versions
        self._store = store
        self._known: dict[str, Assistant] = {}  # by NAME@HEX
        self._flights: SingleFlight[str, Assistant] = SingleFlight()
        self._local: dict[str, Assistant] = {}
        self.reload()

    @property
    def local(self) -> dict[str, Assistant]:
        """The assistants of the models directory, by name."""
        return self._local

    def reload(self) -> None:
        """Reads the models directory anew."""
        self._local = {name: self._adopt(found) for name, found in load_assistants(self._models).items()}
        self._known |= {reference(assistant): assistant for assistant in self._local.values()}

    async def find(self, wanted: str) -> Assistant:
        """The assistant that a reference means.

        Raises:
            UnknownAssistant: there is none.
            AssistantError: its files are damaged.
            StoreUnavailable: it is not here, and the registry cannot be asked.
        """
        known = self._known.get(wanted) if "@" in wanted else self._local.get(wanted)
        return known or await self._flights.run(wanted, lambda: self._bring(wanted))

    async def _bring(self, wanted: str) -> Assistant:
        name, at, version = wanted.partition("@")
        if not at:
            await asyncio.to_thread(self.reload)  # it may have been published since
            if name in self._local:
                return self._local[name]
            raise self._unknown(wanted)
        place = self._versions / version
        with suppress(AssistantError):
            found = await asyncio.to_thread(load_assistant, place)
            if reference(found) == wanted:
                self._known[wanted] = found
                return found
        with tempfile.TemporaryDirectory(dir=_made(self._versions), prefix=".pulled-") as scratch:
            try:
                pulled = await registry.pull(self._store, name, f"sha256:{version}", Path(scratch))
            except (registry.UnknownVersion, InvalidKey) as error:
                raise self._unknown(wanted) from error
            found = await asyncio.to_thread(self._adopt, pulled)
        self._known[wanted] = found
        return found

    def _adopt(self, assistant: Assistant) -> Assistant:
        """The same version, in its own directory."""
        place = self._versions / _hex(assistant)
        with suppress(AssistantError):
            return load_assistant(place)
        with tempfile.TemporaryDirectory(dir=_made(self._versions), prefix=".adopted-") as scratch:
            new = Path(scratch) / "new"
            shutil.copytree(assistant.directory, new, copy_function=_link)
            try:
                new.rename(place)
            except OSError:  # another service was as quick, or what is there is damaged
                with suppress(AssistantError):
                    return load_assistant(place)
                with suppress(OSError):
                    place.rename(Path(scratch) / "damaged")
                    new.rename(place)
        return load_assistant(place)

    def _unknown(self, wanted: str) -> UnknownAssistant:
        known = ", ".join(sorted(self._local)) or "none"
        return UnknownAssistant(f"there is no assistant {wanted[:100]!r} in the registry; here are: {known}")


def reference(assistant: Assistant) -> str:
    """NAME@HEX: one version exactly."""
    return registry.written(assistant.name, assistant.version)


def _hex(assistant: Assistant) -> str:
    return assistant.version.removeprefix("sha256:")


def _link(source: str, target: str) -> None:
    """A second name for the same file where the file system can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
