"""How torch's threads wait for each other. Before torch is loaded, for that is when it is read."""

import os

SPINS = 30_000  # some hundred microseconds


def spin_briefly() -> None:
    """Has threads spin about as long as there is from one operator to the next, unless the environment says else.

    Those that sleep at once are slow to wake: it took an LLM on two cores twice as long to answer. Those that spin as
    long as OpenMP would have them take the cores of the other services'.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
