"""What the machine gives a process."""

from __future__ import annotations

import os
import subprocess
import sys

FORKS = """
import os, torch
from mm_moslora.utils.hardware import renew_threads
torch.set_num_threads(6)
torch.ones(100_000).to(torch.bfloat16)
process = os.fork()
if process == 0:
    before = len(os.listdir("/proc/self/task"))
    renew_threads()
    after = len(os.listdir("/proc/self/task"))
    os._exit(0 if (before, after, torch.get_num_threads()) == (1, 6, 6) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def test_a_forked_process_has_a_thread_pool_before_its_first_thread():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", FORKS], check=True, env=environment, timeout=120)
