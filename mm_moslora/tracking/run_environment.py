"""Environment of a run: git state, versions and hardware, so that it can be identified and repeated."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from mm_moslora.launch.child_processes import output_of
from mm_moslora.utils.package_requirements import installed_version
from mm_moslora.utils.untrusted_files import beside, read_text, read_text_below

PACKAGES = (
    "mm-moslora", "torch", "transformers", "peft", "deepspeed", "datasets", "safetensors", "numpy", "triton",
    "liger-kernel",
)  # fmt: skip
CHECKOUT = Path(__file__).parents[2]
"""Folder of this code, where it runs from a checkout."""
_MOST = 2**12
"""Limit of git's small files, bytes."""
_SCHEDULER = (
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST",
    "SLURM_CLUSTER_NAME",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """What is known of versions, hardware, the scheduler's job, and git in the working folder and this checkout."""
    facts: dict[str, Any] = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        version = installed_version(package)
        if version is not None:
            # A local version such as +cpu depends on how torch was installed here, and no requirement needs it. This
            # package's own is its commit.
            facts[package] = version if package == "mm-moslora" else version.partition("+")[0]
    facts["processors"] = os.cpu_count() or 0
    facts |= _accelerator() | {name.lower(): os.environ[name] for name in _SCHEDULER if os.environ.get(name)}
    own = git_state(CHECKOUT) if os.path.lexists(CHECKOUT / ".git") else {}
    return facts | git_state(Path.cwd()) | {f"code_{name}": value for name, value in own.items()}


def git_state(folder: Path) -> dict[str, Any]:
    """The commit of the working tree around a folder, read from files; empty outside one."""
    # The git program would run what the folder's configuration names (`core.fsmonitor`, filters), and the folder may be
    # somebody else's. It is asked for changes only in this project's own checkout, whose code runs anyway. No remotes:
    # their URLs may hold keys.
    root = next((parent for parent in (folder, *folder.parents) if os.path.lexists(parent / ".git")), None)
    commit = None if root is None else _commit(root)
    if commit is None:
        return {}
    return {"git_commit": commit} | ({"git_changed": _is_changed()} if root == CHECKOUT else {})


def _commit(root: Path) -> str | None:
    """The commit that is checked out in a working tree."""
    try:
        git = root / ".git"
        if git.is_file():  # a linked working tree, or a submodule
            git = beside(root, read_text(git, most=_MOST).removeprefix("gitdir:").strip())
        head = (read_text_below(git, "HEAD") or "").strip()
        common = beside(git, (read_text_below(git, "commondir") or ".").strip())
        if not head.startswith("ref:"):
            return _hash(head)
        name = head.removeprefix("ref:").strip()
        for parent in (git, common):
            if (text := read_text_below(parent, name)) is not None:
                return _hash(text.strip())
        lines = (line.split() for line in (read_text_below(common, "packed-refs") or "").splitlines())
        return next((_hash(words[0]) for words in lines if words[1:] == [name]), None)
    except (OSError, ValueError, RuntimeError):  # no repository of git, or no access
        return None


def _hash(text: str) -> str | None:
    return text if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) else None


def _is_changed() -> bool | None:
    """Whether files of the checkout differ from its commit; None where git does not answer."""
    try:
        done = output_of(  # a lock of the index would refuse a commit meanwhile
            ["git", "--no-optional-locks", "-C", CHECKOUT, "status", "--porcelain", "--untracked-files=no"], seconds=10
        )
    except OSError:
        return None
    return bool(done.stdout.strip()) if done.returncode == 0 else None


def _accelerator() -> dict[str, Any]:
    torch = sys.modules.get("torch")  # never imported only for this
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"accelerator": torch.cuda.get_device_name(0), "accelerators": torch.cuda.device_count()}
