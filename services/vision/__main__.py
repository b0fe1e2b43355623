"""Runs the vision service: `python -m services.vision`."""

import os

# Read when torch is loaded: threads that spin while they wait take the cores of the other services'.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from services.vision.server import main

main()
