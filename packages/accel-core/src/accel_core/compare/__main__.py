"""Tell where two runs part: `python -m accel_core.compare A B`, each a training state or the folder of a run.

The exit status is 0 if they are equal, 1 if they differ, and 2 if they cannot be compared.
"""

from __future__ import annotations

import sys

from ..errors import AccelError
from ..state.comparing import compare_runs


def main(arguments: list[str]) -> int:
    """Print where the runs at both paths part, and return the exit status."""
    if len(arguments) != 2:
        sys.stderr.write("Usage: python -m accel_core.compare A B\n")
        return 2
    try:
        found = compare_runs(arguments[0], arguments[1])
    except AccelError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{found}\n")
    # As diff does it: a script asks by the status alone.
    return 0 if found.first_difference is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
