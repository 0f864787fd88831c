"""`python -m mm_moslora.launch.tied_command COMMAND...`: a command that ends with the process that started this one.

Programs of others do not watch whether their parent is there. This process does (`start_tied`), and ends theirs.
"""

from __future__ import annotations

import sys

from mm_moslora.launch.child_processes import end_with_parent, run_and_hand_on


def main() -> int:
    """Run the command; returns its exit code."""
    end_with_parent()
    return run_and_hand_on(sys.argv[1:]).code


if __name__ == "__main__":
    sys.exit(main())
