"""What counts as the same logits when an export is read back."""

from __future__ import annotations

import pytest
import torch

from mm_moslora.models.export.export_huggingface import largest_logit_difference
from mm_moslora.utils.errors import ModelError


def test_rounding_grows_with_the_logits_and_another_model_is_refused():
    """SmolLM2's logits reach 40, and its folded adapter differs by 8e-4 in fp32: that is rounding."""
    logits = torch.linspace(-40, 40, 101)
    found = largest_logit_difference(logits, logits + 8e-4)
    assert (found, found.scale) == pytest.approx((8e-4, 40), rel=0.01)
    for other in (logits + 0.01, logits * 1.001, torch.full_like(logits, torch.nan)):
        with pytest.raises(ModelError, match="files give other logits"):
            largest_logit_difference(logits, other)
    with pytest.raises(ModelError, match="accepted 1e-04"):
        largest_logit_difference(logits / 100, logits / 100 + 2e-4)
