"""How a run is asked to stop: by a function that is asked between steps, and while features are computed."""

from collections.abc import Callable

Stop = Callable[[], bool]


class Stopped(Exception):
    """The run was asked to stop and did, with what it needs to go on from there when it is started again."""


def never() -> bool:
    return False
