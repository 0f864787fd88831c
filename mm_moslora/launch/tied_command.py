"""`python -m mm_moslora.launch.tied_command KIND COMMAND...`: a launcher of ranks that ends with what started this one.

torchrun and DeepSpeed do not watch whether their parent is there. This process does (`start_tied`), and asks them to
end.
"""

from __future__ import annotations

import sys

from mm_moslora.launch.child_processes import end_with_parent, run_and_hand_on, terminate
from mm_moslora.launch.launcher import DEEPSPEED, end_deepspeed


def main() -> int:
    """Run the command; returns its exit code, of one that a signal killed 128 and its number."""
    end_with_parent()
    kind, *words = sys.argv[1:]
    request_stop = end_deepspeed if kind == DEEPSPEED else terminate
    # In its own process group, which `end_deepspeed` signals.
    code = run_and_hand_on(words, request_stop=request_stop, process_group=0).code
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
