"""Stops what `make up` started here, and waits until it has. Standard library only."""

import argparse
import os
import signal
import sys
import time

from basalt import preflight

WAIT_SECONDS = 60


def main() -> None:
    pid = preflight.running_pid()
    if pid is None:
        print("Basalt is not running here.")
        return
    os.kill(pid, signal.SIGTERM)
    for _ in range(WAIT_SECONDS * 10):
        if preflight.running_pid() is None:
            print("Stopped.")
            return
        time.sleep(0.1)
    sys.exit(f"Process {pid} has not stopped after {WAIT_SECONDS} s; its logs are in {preflight.VAR / 'log'}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help, and what is no option is refused
    main()
