"""Whether our kernels for CPUs run here."""

from __future__ import annotations

import pytest

from mm_moslora.kernels import native


def _why_not() -> str | None:
    try:
        native.library()
    except native.NativeError as error:
        return str(error)
    return None


WHY_NOT = _why_not()
needs_kernels = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
