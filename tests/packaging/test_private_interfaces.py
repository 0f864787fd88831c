"""Private interfaces of libraries that are read or called and not patched (table in docs/architecture.md) are there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from torch import nn
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_peft_takes_custom_layers_and_embeds_by_methods() -> None:
    assert parameters(peft.LoraConfig._register_custom_module) == ["self", "mapping"]
    assert parameters(lora.Embedding._embed)[:3] == ["self", "input", "weight"]
    assert parameters(lora.Embedding._get_embed_scale) == ["self"]


def test_transformers_names_routers_among_what_it_records() -> None:
    from transformers.models.mixtral import modeling_mixtral as mixtral

    recorder = mixtral.MixtralPreTrainedModel._can_record_outputs["router_logits"]
    assert (recorder.target_class, recorder.index, recorder.layer_name) == (mixtral.MixtralTopKRouter, 0, None)
    assert hasattr(mixtral, "load_balancing_loss_func")


def test_peft_keeps_what_runs_outside_of_a_methods_layers_in_the_tuner() -> None:
    from peft.tuners import tuners_utils
    from peft.tuners.ia3.model import IA3Model

    filled = IA3Model._prepare_adapter_config(peft.IA3Config(), {"model_type": "llama"})
    assert filled.feedforward_modules == {"down_proj"}
    assert hasattr(peft.AdaLoraModel, "update_and_allocate")
    assert peft.AdaLoraModel.forward is not tuners_utils.BaseTuner.forward
    assert lora.LoraModel.forward is tuners_utils.BaseTuner.forward
    assert hasattr(lora.LoraModel, "_get_kasa_loss")
    assert {"kasa_config", "monteclora_config"} <= set(parameters(peft.LoraConfig))


def test_accelerate_keeps_its_hook_on_the_module() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    layer, hook = nn.Linear(2, 2), ModelHook()
    assert not hasattr(layer, "_hf_hook")
    add_hook_to_module(layer, hook)
    assert layer._hf_hook is hook


def test_accelerate_forgets_its_settings() -> None:
    from accelerate.state import AcceleratorState

    assert parameters(AcceleratorState._reset_state) == ["reset_partial_state"]


def test_diffusers_packs_latents_and_saves_through_one_function() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers import FluxPipeline
    from diffusers.loaders import lora_base, peft

    flux: Any = FluxPipeline
    latents = torch.arange(64.0).view(1, 4, 4, 4)
    packed = flux._pack_latents(latents, 1, 4, 4, 4)
    assert packed.shape == (1, 4, 16)
    assert torch.equal(flux._unpack_latents(packed, 32, 32, 8), latents)
    assert flux._prepare_latent_image_ids(1, 2, 2, torch.device("cpu"), torch.float32).shape == (4, 3)
    assert {"state_dict", "lora_adapter_metadata"} <= set(parameters(lora_base.LoraBaseMixin.write_lora_layers))
    assert parameters(peft.PeftAdapterMixin.save_lora_adapter)[:3] == ["self", "save_directory", "adapter_name"]


def test_deepspeed_registers_external_parameters_by_identity() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus, register_external_parameter

    module = nn.Linear(2, 2)
    parameter = nn.Parameter(torch.ones(2))
    register_external_parameter(module, parameter)
    external: Any = module._external_params
    assert list(external) == [id(parameter)]
    assert {status.name for status in ZeroParamStatus} >= {"AVAILABLE", "NOT_AVAILABLE"}
    assert "ds_status" in Init._convert_to_deepspeed_param.__code__.co_names


def test_torch_tells_tracing_modes_and_the_backward_pass() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert torch._C._len_torch_dispatch_stack() == 0
    with Mode():
        assert torch._C._len_torch_dispatch_stack() == 1
    assert tree_leaves(tree_map(lambda value: value + 1, {"a": [1, (2,)]})) == [2, 3]

    assert torch._C._get_tracing_state() is None
    traced: list[bool] = []
    torch.jit.trace(lambda x: traced.append(torch._C._get_tracing_state() is not None) or x + 1, torch.ones(1))
    assert traced[0]
    inside: list[bool] = []
    assert torch._C._functorch.peek_interpreter_stack() is None
    torch.func.vmap(lambda x: inside.append(torch._C._functorch.peek_interpreter_stack() is not None) or x)(
        torch.ones(2)
    )
    assert inside == [True]

    assert torch.autograd.forward_ad._current_level < 0
    with torch.autograd.forward_ad.dual_level():
        assert torch.autograd.forward_ad._current_level == 0

    x = torch.ones(1)
    assert x.untyped_storage()._cdata == x.view(1).untyped_storage()._cdata != torch.ones(1).untyped_storage()._cdata


def test_modules_of_torch_keep_their_parts_and_hooks_in_dictionaries() -> None:
    layer = nn.Linear(2, 2)
    assert set(layer._parameters) == {"weight", "bias"}
    assert set(nn.Sequential(layer)._modules) == {"0"}
    for register, kept in (
        (layer.register_forward_hook, layer._forward_hooks),
        (layer.register_forward_pre_hook, layer._forward_pre_hooks),
        (layer.register_full_backward_hook, layer._backward_hooks),
        (layer.register_full_backward_pre_hook, layer._backward_pre_hooks),
    ):  # fmt: skip
        register(lambda *_: None)
        assert len(kept) == 1
    assert torch.compile(layer, backend="eager")._orig_mod is layer  # type: ignore[attr-defined]
    assert isinstance(nn.BatchNorm2d(2), nn.modules.batchnorm._BatchNorm)


def test_operators_of_torch_take_what_they_are_given() -> None:
    aten = torch.ops.aten
    named = {
        operator: [argument.name for argument in operator.default._schema.arguments]
        for operator in (
            aten._softmax_backward_data, aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention_for_cpu_backward, aten._local_scalar_dense,
        )
    }  # fmt: skip
    assert list(named.values()) == [
        ["grad_output", "output", "dim", "input_dtype"],
        ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"],
        ["grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal", "attn_mask", "scale"],
        ["self"],
    ]


def test_operators_over_lists_of_tensors_convert_and_add() -> None:
    narrow, wide = [torch.ones(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)], [torch.zeros(2)]
    wide.append(torch.zeros(3))
    torch._foreach_copy_(wide, narrow)
    torch._foreach_add_(wide, [tensor.float() for tensor in narrow])
    assert [tensor.tolist() for tensor in wide] == [[2.0] * 2, [2.0] * 3]


def test_layers_of_a_dynamic_cache_can_be_others() -> None:
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2
    assert parameters(DynamicLayer.lazy_initialization) == ["self", "key_states", "value_states"]
    assert parameters(DynamicLayer.batch_select_indices) == ["self", "indices"]

    class Layer(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            return key_states, "mine"

    cache.layers = [Layer() for _ in cache.layers]
    assert cache.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)[1] == "mine"


def test_bitsandbytes_packs_for_cpus_where_it_is_undone() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    assert parameters(functional._convert_weight_packed_for_cpu_inverse)[:2] == ["packed_weight", "quant_state"]
    assert "packing_format_for_cpu" in functional._convert_weight_packed_for_cpu.__code__.co_names
    layer = Linear4bit(64, 64)
    assert {"support_avx512bf16_for_cpu", "compute_type_is_set", "compute_dtype"} <= set(vars(layer))
    assert parameters(layer.set_compute_type) == ["x"]
    assert type(layer.weight) is Params4bit
    assert layer.weight.quant_state is None


def test_open_clip_builds_a_vision_tower_alone() -> None:
    model = pytest.importorskip("open_clip.model", reason="open_clip_torch is not installed")
    assert parameters(model._build_vision_tower)[:3] == ["embed_dim", "vision_cfg", "quick_gelu"]


def test_datasets_identify_a_table() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    one, other = (datasets.Dataset.from_dict({"a": [value]}) for value in (1, 2))
    assert one._fingerprint != other._fingerprint
    assert isinstance(one._fingerprint, str)


def test_the_hub_reads_whether_it_is_offline_when_it_is_asked() -> None:
    from huggingface_hub import constants

    assert isinstance(constants.HF_HUB_OFFLINE, bool)
    assert "HF_HUB_OFFLINE" in constants.is_offline_mode.__code__.co_names


def test_trl_reads_its_data_and_writes_checkpoints_by_methods() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl.trainer.dpo_trainer import DPOTrainer

    named = parameters(DPOTrainer._prepare_dataset)
    assert named == ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert parameters(DPOTrainer._send_telemetry) == ["self"]
    assert parameters(DPOTrainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(DPOTrainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    named = parameters(DPOTrainer._prepare_for_training)
    assert named == ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"]
    assert parameters(DPOTrainer._load_optimizer_and_scheduler) == ["self", "checkpoint"]
