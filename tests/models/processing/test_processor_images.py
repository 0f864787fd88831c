"""Pictures of ready-made models: what a processor writes around them, and which tokens it marks as theirs."""

from __future__ import annotations

import pytest
import torch
from small_families import default_config, stand_in_processor
from transformers import AutoModelForImageTextToText

from mm_moslora.models.assembly import pretrained_parts
from mm_moslora.models.batching.padded_batch import text_inputs
from mm_moslora.planning.probe_conversations import SIGHTED, example_of, stock_inputs


@pytest.mark.parametrize("kind", ["molmo2", "gemma3"])
def test_ids_and_types_of_tokens_are_those_of_the_processor(kind: str) -> None:
    """Molmo 2's puts BOS before a text and marks columns and borders; Gemma 3's joins its line breaks to the text's."""
    config = default_config(kind)
    processor = stand_in_processor(config)
    parts = pretrained_parts(processor, model=None, image_token_id=config.image_token_id, base={})
    example = example_of(parts, SIGHTED)
    expected = stock_inputs(processor, SIGHTED)
    assert example.input_ids.tolist() == expected["input_ids"][0, : example.length].tolist()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    (picture,) = example.pictures
    marked = picture.tensors.get("picture_tokens")
    given = text_inputs(model, [example.input_ids], picture_tokens=marked)
    name = "mm_token_type_ids" if "mm_token_type_ids" in expected else "token_type_ids"
    assert given[name].tolist() == expected[name][:, : example.length].tolist()


def test_a_picture_in_the_middle_of_a_text_does_not_begin_one() -> None:
    config = default_config("molmo2")
    processor = stand_in_processor(config)
    parts = pretrained_parts(processor, model=None, image_token_id=config.image_token_id, base={})
    assert processor.tokenizer.bos_token_id not in example_of(parts, SIGHTED).pictures[0].placeholders
    assert example_of(parts, SIGHTED).input_ids.tolist().count(processor.tokenizer.bos_token_id) == 1
