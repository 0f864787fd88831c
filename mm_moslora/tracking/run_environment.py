"""Environment of a run: git state, versions and hardware, so that it can be identified and repeated."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from mm_moslora.utils.package_requirements import installed_version

PACKAGES = (
    "mm-moslora", "torch", "transformers", "peft", "deepspeed", "datasets", "safetensors", "numpy", "triton",
    "liger-kernel",
)  # fmt: skip


_SCHEDULER = (
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST",
    "SLURM_CLUSTER_NAME",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, hardware, the scheduler's job and the git state of the working folder; unknown values are left out."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        version = installed_version(package)
        if version is not None:
            # A local version such as +cpu depends on how torch was installed here, and no requirement needs it.
            found[package] = version.partition("+")[0]
    found["processors"] = os.cpu_count() or 0
    found |= _accelerator() | {name.lower(): os.environ[name] for name in _SCHEDULER if os.environ.get(name)}
    return found | git_state(Path.cwd())


def git_state(folder: Path) -> dict[str, Any]:
    """Commit, and whether files differ from it; empty outside a repository. No remotes: their URLs may hold keys."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"git_commit": commit, "git_changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _accelerator() -> dict[str, Any]:
    torch = sys.modules.get("torch")  # never imported only for this
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"accelerator": torch.cuda.get_device_name(0), "accelerators": torch.cuda.device_count()}
