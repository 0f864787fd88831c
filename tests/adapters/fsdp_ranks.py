"""Called in two ranks by `test_adapter_ecosystem.py`: adapters under FSDP 1 and 2 train as without, and save whole."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from mm_moslora.adapters import merge, save_adapter
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import IDS, adapted


def both_kinds(folder: str) -> None:
    """See `ranks.Ranks.start`, which also ends the process: torch keeps the group, and its threads outlive it."""
    os.environ |= {"ACCELERATE_USE_CPU": "1", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    dist.init_process_group("gloo")
    fsdp1(Path(folder))
    fsdp2(Path(folder))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found
    return found


def fsdp1(folder: Path) -> None:
    model = adapted().train()
    expected = gradients(copy.deepcopy(model))
    policy = fsdp_auto_wrap_policy(model)
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    sharded(input_ids=IDS, labels=IDS).loss.backward()
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
        whole = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in sharded.named_parameters()}
        for name, gradient in expected.items():
            torch.testing.assert_close(whole[name].grad, gradient)
        if dist.get_rank() == 0:
            save_adapter(adapted(), folder / "fsdp1", state=whole)


def fsdp2(folder: Path) -> None:
    model = adapted().train()
    expected = gradients(copy.deepcopy(model))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if not list(module.children()) and any(p.requires_grad for p in module.parameters()):
            fully_shard(module, mesh=mesh)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient.full_tensor(), expected[name])
    for refused in (
        lambda: save_adapter(model, folder / "shards"),
        lambda: model.save_pretrained(folder / "shards"),
        lambda: merge(model),
    ):
        with pytest.raises(AdapterError, match=r"is a shard \(FSDP"):
            refused()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        save_adapter(model, folder / "fsdp2", state=state)
        model.save_pretrained(folder / "fsdp2-peft", state_dict=state)
