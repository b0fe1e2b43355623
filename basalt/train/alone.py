"""One process at a time in a directory: the lock goes with the process that holds it, however that ends."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from basalt.train.stop import Stop, Stopped

LOCK = "lock"  # a file of the directory


@contextmanager
def alone(directory: Path, stop: Stop) -> Iterator[None]:
    """Waits until no other process is at work in the directory.

    Raises:
        Stopped: `stop` said so meanwhile.
    """
    with (directory / LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop():
                    raise Stopped(f"stopped while another process is at work in {directory}") from None
                time.sleep(0.2)
        yield
