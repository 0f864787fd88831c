"""Triton's kernels, own ones and Liger's, against PyTorch's operators, in Triton's interpreter.

`test_kernel_selection.py` runs this file.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers as t
from pass_checks import PassChecks, batch, lean_model, use
from triton_interpreter import complete_interpreter

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
