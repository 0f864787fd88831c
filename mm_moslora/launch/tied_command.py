"""`python -m mm_moslora.launch.tied_command COMMAND...`: a command that ends with the process that started this one.

Programs of others do not watch whether their parent is there. This process does (`start_tied`), and ends theirs.
"""

from __future__ import annotations

import sys

from mm_moslora.launch.child_processes import end_group, end_with_parent, run_and_hand_on

_WORKERS_SECONDS = 3.0
"""Seconds in which processes that the command leaves behind may end by themselves."""


def main() -> int:
    """Run the command; returns its exit code, of one that a signal killed 128 and its number."""
    end_with_parent()
    code = run_and_hand_on(sys.argv[1:]).code
    end_group(seconds=_WORKERS_SECONDS)
    return code if code >= 0 else 128 - code  # as a shell says it


if __name__ == "__main__":
    sys.exit(main())
