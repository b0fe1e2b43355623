"""What a request names: an uploaded file, a path under the data root, or an object."""

import asyncio
from pathlib import Path

from basalt.api_errors import bad_request
from basalt.eval.run import fetch
from basalt.object_store import InvalidKey, ObjectStore
from basalt.record.database import Sessions
from basalt.record.files import get_file

PREFIX = "benchmarks/"  # of the objects that evals may name


class Data:
    """Where the files of evals are found."""

    def __init__(self, root: Path | None, sessions: Sessions, store: ObjectStore, folder: Path) -> None:
        self._root, self._sessions, self._store, self._folder = root, sessions, store, folder

    def check(self, name: str, param: str) -> None:
        """
        Raises:
            APIError: (400) there is none of this name.
            NoSuchFile: nor an uploaded one of this id.
            StoreUnavailable: nobody can say.
        """
        if name.startswith("file-"):
            self._uploaded(name)
        elif self._under_root(name) is None and not self._is_object(name):
            raise bad_request(
                f"there is no {name[:200]!r}: give the id of an uploaded file (file-…), a path under the evaluator's "
                f"data root, or a key of the object store that begins with {PREFIX!r}",
                param,
            )

    async def bring(self, name: str) -> Path:
        """The file on this machine.

        Raises:
            DataError, NoSuchFile: it is gone.
            StoreUnavailable: the object store is not there.
        """
        if name.startswith("file-"):
            key, filename = await asyncio.to_thread(self._uploaded, name)
            path = await fetch(key, self._store, self._folder)
            named = path.with_name(filename)  # by its ending the format is known
            if named != path:
                await asyncio.to_thread(path.replace, named)
            return named
        return self._under_root(name) or await fetch(name, self._store, self._folder)

    def _uploaded(self, name: str) -> tuple[str, str]:
        with self._sessions() as session:
            file = get_file(session, name)
            return file.key, file.filename

    def _under_root(self, name: str) -> Path | None:
        if self._root is None:
            return None
        path = (self._root / name).resolve()
        return path if path.is_relative_to(self._root.resolve()) and path.exists() else None

    def _is_object(self, name: str) -> bool:
        try:
            return name.startswith(PREFIX) and asyncio.run(self._store.exists(name))
        except InvalidKey:
            return False
