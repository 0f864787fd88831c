"""Weights read straight to the GPU, and inputs of checkpointed layers that wait in main memory."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from mm_moslora.batch import Batch, Example
from mm_moslora.config import AdapterConfig, ModelConfig, VisionConfig
from mm_moslora.kernels.attention.attention_choice import set_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers
from mm_moslora.models.memory_efficient.loss_head import head_loss_sum
from mm_moslora.models.trainable_parts import attach_adapters, checkpoint_layers, offload_inputs
from mm_moslora.models.vlm import supervised_hidden


def test_weights_and_adapters_on_the_gpu_are_those_of_the_cpu(parts, device) -> None:
    config = ModelConfig(language=str(parts["language"]), vision=VisionConfig(name=str(parts["vision"])))
    found = []
    for place in (None, device):
        torch.manual_seed(3)
        loaded = load_parts(config, device=place)
        attach_adapters(loaded, config, AdapterConfig(rank=4, alpha=8, mixer_init="kaiming"))
        found.append((dict(loaded.model.state_dict()), torch.get_rng_state()))
    (here, state), (there, other) = found
    assert torch.equal(state, other)
    assert here.keys() == there.keys()
    for name, value in there.items():
        assert value.device == device, name
        assert torch.equal(value.cpu(), here[name]), name


def taught(device: torch.device, *, offload: bool) -> t.PreTrainedModel:
    torch.manual_seed(0)
    sizes = t.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8
    )
    model = t.LlamaForCausalLM(sizes).to(device, torch.bfloat16)
    recipe = ModelConfig(language="none")
    attach_adapters(Parts(model=model), recipe, AdapterConfig(rank=8, alpha=16))
    set_attention(model, SEGMENTS)
    use_lean_layers(model)
    checkpoint_layers(model.get_decoder())
    if offload:
        offload_inputs(model)
    return model.train()


def gradients(model: t.PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    for _ in range(3):  # micro-batches of one step
        head_loss_sum(model, supervised_hidden(model, batch), batch.targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tokens", [64, 4096])
def test_offloaded_inputs_give_the_same_gradients_and_leave_the_gpu(tokens, device) -> None:
    ids = torch.randint(512, (tokens,), generator=torch.Generator().manual_seed(1))
    batch = Batch.from_examples([Example(id="", input_ids=ids, supervised=torch.arange(tokens) % 3 == 0)]).to(device)
    found, kept = [], []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for offload in (False, True):
            model = taught(device, offload=offload)
            found.append(gradients(model, batch))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                before = torch.cuda.memory_allocated(device)
                loss = head_loss_sum(model, supervised_hidden(model, batch), batch.targets)
                torch.cuda.synchronize(device)
                kept.append(torch.cuda.memory_allocated(device) - before)
                del loss
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name
    if kept:
        assert kept[0] - kept[1] > 9 * tokens * 512 * 2  # inputs of twelve layers, less those that are on their way
