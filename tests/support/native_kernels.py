"""Whether the C++ kernels can run on this machine; where they can, a failure to compile is a failure of the tests."""

from __future__ import annotations

import pytest

from mm_moslora.kernels import native
from mm_moslora.utils.hardware import CPUINFO


def _why_not() -> str | None:
    if native.find_compiler() is None:
        return "no C++ compiler"
    if not CPUINFO.is_file() or "avx2" not in CPUINFO.read_text():
        return "a processor without AVX2"
    native.library()
    return None


WHY_NOT = _why_not()
needs_kernels = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
