"""The estimate of a step's memory, by which steps are cut into micro-batches, against the peak of the allocator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from trials import make_recipe

from mm_moslora.batch import Batch, Example
from mm_moslora.training.metrics.gpu_memory import MODEL_ERROR, StepMemory
from mm_moslora.training.metrics.model_cost import model_cost
from mm_moslora.training.run_setup import prepare


def write_language(folder: Path, *, width: int, layers: int) -> Path:
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step_is_what_the_token_budget_stands_on(checkpointing, parts, device, tmp_path) -> None:
    on_gpu = device.type == "cuda"
    width, layers, tokens = (1024, 12, 8192) if on_gpu else (128, 2, 256)
    own = parts | {"language": write_language(tmp_path / "language", width=width, layers=layers)}
    recipe = make_recipe(
        own, tmp_path / "run", "none", precision="bf16" if on_gpu else "fp32", gradient_checkpointing=checkpointing
    )
    run = prepare(recipe)
    assert (run.limit.tokens is not None) == on_gpu
    ids = torch.randint(5, len(run.assembly.tokenizer), (tokens // 4,))
    example = Example(id="", input_ids=ids, supervised=torch.arange(len(ids)) >= len(ids) * 7 // 8)
    batch = Batch.from_examples([example] * 4)
    assert run.engine.step([Batch.from_examples([example])], 1.0).applied  # makes the optimiser's state
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    assert run.engine.step([batch], 1.0).applied
    step = StepMemory(size=model_cost(recipe.model, recipe.adapter), zero="none", world=1, checkpointing=checkpointing)
    needed = step.of(tokens, supervised=batch.supervised_tokens, images=0)
    if on_gpu:
        planned = needed.total - needed.context
        assert torch.cuda.max_memory_allocated(device) == pytest.approx(planned, rel=MODEL_ERROR)
