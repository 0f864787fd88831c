"""What the patches of DeepSpeed stand on; a test here fails when an installed release changes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import pytest
import torch
from torch import nn

from mm_moslora.training.engine.deepspeed_patches import cpu_adam
from mm_moslora.training.engine.deepspeed_settings import skip_shared_memory_operator

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from deepspeed.ops import adam
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import link_hp_params


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def inner(function: Callable[..., Any], name: str) -> list[str]:
    """Parameters of a function that is made inside another one."""
    (found,) = (code for code in function.__code__.co_consts if isinstance(code, CodeType) and code.co_name == name)
    return list(found.co_varnames[: found.co_argcount])


def attributes(kind: type) -> set[str]:
    """Names that the methods of a class use."""
    return {name for value in vars(kind).values() if inspect.isfunction(value) for name in value.__code__.co_names}


STAGE_3, STAGES_1_AND_2 = DeepSpeedZeroOptimizer_Stage3, DeepSpeedZeroOptimizer
PARAMETERS: dict[Callable[..., Any], list[str]] = {
    STAGE_3.invalidate_secondary_tensor: ["self"],
    STAGE_3._rigid_load_state_dict: ["self", "state_dict", "load_optimizer_states"],
    STAGE_3._rigid_state_dict: ["self"],
    STAGE_3.checkpoint_event_prologue: ["self"],
    STAGE_3.checkpoint_event_epilogue: ["self"],
    STAGE_3._get_param_partition_rank: ["self", "param"],
    STAGE_3.get_param_id: ["self", "param"],
    STAGES_1_AND_2.scaled_global_norm: ["self", "norm_type"],
    STAGES_1_AND_2.check_overflow: ["self", "partition_gradients"],
    UlyssesSPAttentionHF.forward: ["self", "module", "query", "key", "value", "attention_mask"],
}
"""The first ones of functions that are called."""
ATTRIBUTES: dict[type, set[str]] = {
    STAGE_3: {
        "persistent_parameters", "ds_secondary_tensor", "grad_partitions_flat_buffer", "grad_position",
        "fp32_partitioned_groups_flat", "offload_optimizer", "swap_optimizer",
    },
    STAGES_1_AND_2: {"bit16_groups", "single_partition_of_fp32_groups", "cpu_offload"},
    FP16_UnfusedOptimizer: {"fp16_groups", "fp32_groups"},
    DeepSpeedZeRoOffload: {"fwd_pre_hook", "forward_hooks", "backward_hooks"},
    DynamicLossScaler: {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"},
}  # fmt: skip


def test_what_is_called_and_read_has_these_names() -> None:
    for function, expected in PARAMETERS.items():
        assert parameters(function)[: len(expected)] == expected, function
    for kind, names in ATTRIBUTES.items():
        assert attributes(kind) >= names, kind
    convert = Init._convert_to_deepspeed_param
    assert inner(convert, "all_gather")[0] == "param_list"
    assert inner(convert, "all_gather_coalesced")[0] == "params"
    assert "_hp_mapping" in link_hp_params.__code__.co_names
    assert "raise_error_at_min_scale" in parameters(DynamicLossScaler.__init__)
    assert {
        "attn", "batch_size", "attn_head_count", "attn_head_size", "kv_head_count", "num_hidden_layers",
        "process_group", "seq_length_is_variable",
    } <= set(parameters(UlyssesSPAttentionHF.__init__))  # fmt: skip


def test_weights_are_cut_up_one_by_one_and_by_their_identity() -> None:
    assert inner(Init._convert_to_deepspeed_param, "convert_to_zero_parameters") == ["param_list"]
    seen: list[nn.Parameter] = []

    class Noting(Init):
        def __init__(self) -> None:
            self.local_device = torch.device("cpu")

        def _zero_init_param(self, param: nn.Parameter) -> None:
            seen.append(param)

    def arriving() -> Iterator[nn.Parameter]:
        for number in range(3):
            assert len(seen) == number  # the one before is done
            yield nn.Parameter(torch.zeros(number + 1))

    Noting()._convert_to_zero_parameters(arriving())
    assert [len(parameter) for parameter in seen] == [1, 2, 3]


def test_the_compiled_adam_counts_steps_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for DeepSpeed's class, whose operator takes minutes to build: it counts in an int."""
    real = inspect.signature(adam.DeepSpeedCPUAdam.__init__).parameters

    class Counting(torch.optim.Optimizer):
        def __init__(self, groups: Any, **settings: Any) -> None:
            assert settings.keys() <= real.keys()
            assert settings.pop("adamw_mode")
            super().__init__(groups, settings)

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    count = self.state[parameter].setdefault("step", 0)
                    assert isinstance(count, int)
                    self.state[parameter]["step"] = count + 1

    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", Counting)
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    adamw = torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": [second], "weight_decay": 0.5}], eps=1e-5)
    made = cpu_adam(adamw)
    assert [group["weight_decay"] for group in made.param_groups] == [1e-2, 0.5]
    assert made.param_groups[0]["lr"] == 0.1
    loaded = made.state[first]["step"] = torch.tensor(7.0)
    made.step()
    made.step()
    assert made.state[first]["step"] is loaded
    assert [made.state[parameter]["step"].item() for parameter in (first, second)] == [9.0, 2.0]


def test_stages_1_and_2_find_overflows_in_the_norm() -> None:
    if not hasattr(stage_1_and_2, "is_invalid_grad_norm"):
        pytest.skip("this DeepSpeed checks for overflow apart from the norm")
    names = DeepSpeedZeroOptimizer.step.__code__.co_names
    assert names.index("scaled_global_norm") < names.index("is_invalid_grad_norm") < names.index("_update_scale")


def test_the_operator_for_communication_on_cpus_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops

    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", dict(deepspeed.ops.__compatible_ops__))
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    skip_shared_memory_operator()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
