"""Check training states and exports: `python -m accel_core.verify PATH`, or the address of a store.

A line for each says "good" or what is wrong with it. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import sys

from ..errors import AccelError
from ..state.verifying import verify_checkpoint


def main(arguments: list[str]) -> int:
    """Print what is wrong with each state and export at paths or addresses, and return the exit status."""
    if not arguments:
        sys.stderr.write("Usage: python -m accel_core.verify PATH...\n")
        return 2
    status = 0
    for path in arguments:
        try:
            found = verify_checkpoint(path)
        except AccelError as error:
            sys.stderr.write(f"{error}\n")
            status = 1
            continue
        for checked, flaw in found.items():
            sys.stdout.write(f"{checked}: {flaw or 'good'}\n")
            status = 1 if flaw else status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
