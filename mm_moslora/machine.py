"""The machine in a few words, to stand beside every figure."""

from __future__ import annotations

import platform
from pathlib import Path


def hardware() -> str:
    """Processor, cores and memory in a few words."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    memory = Path("/proc/meminfo").read_text().split()[1] if cpuinfo.is_file() else "0"
    return f"{names[0] if names else platform.processor()}, {len(names)} cores, {int(memory) / 2**20:.0f} GiB"
