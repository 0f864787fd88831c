"""Jobs as an array of SLURM: one batch script with a command for every element."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from mm_moslora.launch.jobs import THREADS, Job
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import replace_text
from mm_moslora.utils.folder_marks import output_file

_HEAD = """\
#!/bin/bash
# {count} jobs of mm-moslora, one in each element. An element that runs twice changes nothing.
# What your cluster wants goes before the file: sbatch --partition=gpu --gpus-per-node=1 --time=8:00:00 FILE
#SBATCH --job-name=mm-moslora
#SBATCH --array=0-{last}
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task={cores}
{cards}#SBATCH --output=/dev/null
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
export PYTHONSAFEPATH=1
case "$SLURM_ARRAY_TASK_ID" in
"""
_SIGN = re.compile(re.sub(r"\\\{\w+\\\}", r"(\\d+|#SBATCH --gpus-per-node=\\d+\n)?", re.escape(_HEAD)).encode())
"""The whole head: a script with lines of a user in it is not replaced."""


def write_array(file: Path, jobs: Sequence[Job]) -> None:
    """Write the batch script. SLURM requeues the elements of a lost node; two minutes before the limit a job saves.
    Elements are in the order of the jobs; cards and cores are those of the greatest.
    """
    if not jobs:
        raise ConfigError("No job is left for a SLURM array.")
    cards = max(job.cards for job in jobs)
    head = _HEAD.format(
        count=len(jobs), last=len(jobs) - 1, cores=max(job.cores for job in jobs),
        cards=f"#SBATCH --gpus-per-node={cards}\n" if cards else "",
    )  # fmt: skip
    output_file(file, sign=_SIGN)
    replace_text(file, head + "".join(f"{index}) {_element(job)};;\n" for index, job in enumerate(jobs)) + "esac\n")


def _element(job: Job) -> str:
    """The commands of an element: output into the log, and the job in place of the shell, so that it gets signals."""
    log = job.folder / job.log  # the array may be submitted from any folder
    log_folder, folder, log_file = (shlex.quote(str(path)) for path in (log.parent, job.folder, log))
    words = shlex.join(["env", *(f"{name}={os.environ[name]}" for name in THREADS if name in os.environ), *job.words])
    return f"mkdir -p {log_folder} && {{ cd {folder} && exec {words}; }} >>{log_file} 2>&1 </dev/null"
