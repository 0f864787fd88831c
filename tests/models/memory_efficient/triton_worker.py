"""Triton's kernels, own ones and Liger's, against PyTorch's operators, in Triton's interpreter.

`test_kernel_selection.py` runs this file.
"""

from __future__ import annotations

import importlib.util
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import transformers as t
from pass_checks import PassChecks, batch, lean_model, use
from triton_interpreter import complete_interpreter

from mm_moslora.kernels import triton_trial
from mm_moslora.kernels.fused_ops.torch_ops import TORCH_OPS
from mm_moslora.kernels.fused_ops.triton_ops import TRITON_OPS
from mm_moslora.models.memory_efficient.kernel_selection import choose_kernels, use_kernels
from mm_moslora.models.memory_efficient.loss_head import head_loss_sum
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.utils.errors import ConfigError

complete_interpreter()


class TestTriton(PassChecks):
    passes = TRITON_OPS
    name = "triton"
    words = "Triton's (triton 3."


if importlib.util.find_spec("liger_kernel") is not None:
    from liger_kernel.ops import rms_norm
    from triton import language

    from mm_moslora.kernels.fused_ops.liger_ops import LIGER_OPS

    rms_norm.rsqrt = lambda x: language.rsqrt(x)  # functions of libdevice have no body in the interpreter

    class TestLiger(PassChecks):
        passes = LIGER_OPS
        name = "liger"
        words = "liger-kernel 0.8"

    def test_what_takes_the_place_of_kept_tensors_is_not_used_twice() -> None:
        model = lean_model("llama", torch.float32)
        use(model, LIGER_OPS)
        given = batch()
        loss = head_loss_sum(model, supervised_hidden(model, given), given.targets)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_auto_is_triton_wherever_it_runs() -> None:
    chosen = choose_kernels("auto", torch.device("cpu"))
    assert chosen.passes is TRITON_OPS
    assert not chosen.required
    assert choose_kernels("torch", torch.device("cpu")).passes is TORCH_OPS


def test_a_model_without_lean_layers_refuses_triton() -> None:
    model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    assert not use_kernels(model, choose_kernels("auto", torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no lean decoder layers.*Set model\.kernels"):
        use_kernels(model, choose_kernels("triton", torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_of_all_kernels_passes(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    assert triton_trial.wrong_kernels(torch.device("cpu"), dtype) == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [item.name for item in fields(TRITON_OPS)])
@pytest.mark.parametrize("fault", ["off", "no number"])
def test_a_wrong_kernel_is_named(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        found = getattr(TRITON_OPS, name)(*arguments)
        for tensor in found if isinstance(found, tuple) else (found,):
            tensor[..., -1:] += torch.nan if fault == "no number" else tensor.float().square().mean().sqrt()
        return found

    monkeypatch.setattr(triton_trial, "TRITON_OPS", replace(TRITON_OPS, **{name: broken}))
    found = triton_trial.wrong_kernels(torch.device("cpu"), torch.bfloat16)
    assert found == [name]


def test_masks_of_the_two_dropout_kernels_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add = triton_trial.add_kept_products

    def with_other_seeds(total: Any, us: Any, As: Any, masks: Any) -> None:
        add(total, us, As, [(seed + 1, dropped) for seed, dropped in masks])

    monkeypatch.setattr(triton_trial, "add_kept_products", with_other_seeds)
    assert triton_trial.wrong_kernels(torch.device("cpu"), torch.bfloat16) == [
        "masks of add_kept_products", "add_kept_products",
    ]  # fmt: skip


def test_the_weight_of_a_norm_may_be_strided() -> None:
    x, grad, weight = torch.randn(5, 24), torch.randn(5, 24), torch.randn(48)[::2]
    expected, inverse = TORCH_OPS.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(TRITON_OPS.rms_norm(x, weight, 1e-6)[0], expected)
    torch.testing.assert_close(TRITON_OPS.recompute_rms_norm(x, weight, inverse), expected)
    expected = TORCH_OPS.rms_norm_backward(grad, x, weight, inverse)
    torch.testing.assert_close(TRITON_OPS.rms_norm_backward(grad.clone(), x, weight, inverse), expected)
