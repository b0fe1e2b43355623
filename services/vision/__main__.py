"""Runs the vision service: `python -m services.vision`."""

from basalt.threads import spin_briefly

spin_briefly()

from services.vision.server import main  # noqa: E402  (loads torch, which reads it)

main()
