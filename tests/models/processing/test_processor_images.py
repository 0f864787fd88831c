"""Pictures of ready-made models: what a processor writes around them, and which tokens it marks as theirs."""

from __future__ import annotations

import pytest
import torch
from small_families import default_config, stand_in_processor
from transformers import AutoModelForImageTextToText

from mm_moslora.models.assembly import pretrained_parts
from mm_moslora.models.batching.padded_batch import text_inputs
from mm_moslora.planning.probe_conversations import SIGHTED, example_of, stock_inputs
from mm_moslora.utils.errors import ModelError


def test_ids_and_types_of_tokens_are_those_of_the_processor() -> None:
    """Gemma 3's joins its line breaks to the text's."""
    config = default_config("gemma3")
    processor = stand_in_processor(config)
    parts = pretrained_parts(processor, model=None, image_token_id=config.image_token_id, base={})
    example = example_of(parts, SIGHTED)
    expected = stock_inputs(processor, SIGHTED)
    assert example.input_ids.tolist() == expected["input_ids"][0, : example.length].tolist()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    given = text_inputs(model, [example.input_ids])
    assert given["token_type_ids"].tolist() == expected["token_type_ids"][:, : example.length].tolist()


@pytest.mark.parametrize("kind", ["molmo2", "minicpmv4_6"])
def test_a_processor_that_joins_pictures_is_refused(kind: str) -> None:
    """Molmo 2's places count over all pictures of a call, MiniCPM-V's pictures become one tensor."""
    config = default_config(kind)
    with pytest.raises(ModelError, match=r"joins the pictures of a call.*Choose another model"):
        pretrained_parts(stand_in_processor(config), model=None, image_token_id=config.image_token_id, base={})
