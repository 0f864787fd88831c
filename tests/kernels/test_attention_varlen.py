"""On CUDA all segments of a row go through one kernel, which is tried first, with the right arguments.

Without a GPU: a kernel's meaning is written out after its documentation, and the installed one is called on meta
tensors. `tests/gpu` has the kernels themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen

from mm_moslora.kernels.attention import gpu_attention, segment_attention
from mm_moslora.kernels.attention.attention_choice import choose_attention
from mm_moslora.kernels.attention.gpu_attention import HeadShape, fault_of, pytorch_kernel
from mm_moslora.utils.errors import ConfigError

LENGTHS = (5, 1, 12)
HEADS, WIDTH, SCALE = 4, 16, 0.3
CPU = HeadShape(device=torch.device("cpu"), dtype=torch.bfloat16, width=WIDTH, groups=2)


def documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` on ``[T, H, E]``, as its documentation has it."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert cu_seq_q.dtype == torch.int32
    outputs, ends = [], cu_seq_q.tolist()
    assert max_q == max_k == max(end - start for start, end in itertools.pairwise(ends))
    for start, end in itertools.pairwise(ends):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        places = torch.arange(end - start)
        ahead = places[None, :] - places[:, None]
        left, right = (end if side < 0 else side for side in window_size)
        mask = (ahead <= right) & (ahead >= -left)
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(outputs, 1).transpose(0, 1)


def kernel_of_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), shares: bool = True,
) -> Tensor:  # fmt: skip
    """The same without the argument for shared heads, which it takes all the same, or takes wrong."""
    if not shares and query.shape[1] != key.shape[1]:
        key, value = (tensor[:, :1].expand(-1, query.shape[1], -1) for tensor in (key, value))
    given = {"scale": scale, "window_size": window_size}
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa=True, **given)


KERNELS = {"documented": documented, "2.11": kernel_of_2_11, "2.11, wrong": partial(kernel_of_2_11, shares=False)}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    """Puts a kernel into PyTorch's place, and takes the CPU for a GPU that it runs on."""
    monkeypatch.setattr(gpu_attention, "_why_not_pytorch", lambda _: None)
    pytorch_kernel.cache_clear()

    def put(kernel: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        pytorch_kernel.cache_clear()

    return put


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_is_told_what_the_loop_over_segments_computes(
    kernel: str, window: int | None, key_heads: int, installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), WIDTH) for heads in (HEADS, key_heads, key_heads)]
    rows = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    pull = torch.randn(1, sum(LENGTHS), HEADS, WIDTH, dtype=torch.float64)

    def result() -> list[Tensor]:
        leaves = [row.clone().requires_grad_() for row in rows]
        given = segment_attention.segment_arguments(LENGTHS, torch.device("cpu"))
        given |= {"sliding_window": window, "scaling": SCALE}
        output, _ = segment_attention.segment_attention(torch.nn.Module(), *leaves, None, **given)
        output.backward(pull)
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    expected = result()
    installed(KERNELS[kernel])
    found = pytorch_kernel(HeadShape(device=CPU.device, dtype=torch.float64, width=WIDTH, groups=HEADS // key_heads))
    monkeypatch.setattr(segment_attention, "varlen_kernel", lambda *_: found.kernel)
    for mine, exact in zip(result(), expected, strict=True):
        torch.testing.assert_close(mine, exact)
    wrong = kernel == "2.11, wrong" and key_heads < HEADS
    assert found.words == f"PyTorch's varlen_attn{' with repeated heads' if wrong else ''}"
    assert len(found.faults) == wrong


def test_a_kernel_that_fails_or_is_wrong_is_named_and_the_loop_taken(installed) -> None:
    def missing(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    installed(missing)
    found = pytorch_kernel(CPU)
    assert found.kernel is None
    assert found.words.startswith("a loop over segments")
    assert found.faults[0].startswith(
        "PyTorch's varlen_attn with shared heads does not run here: RuntimeError: no kernel"
    )
    assert found.faults[0].endswith("execution on the device")

    def across_segments(query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)

    assert "its output differs" in str(fault_of(across_segments, CPU))


@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_the_installed_kernel_takes_a_row_forward_and_backward(key_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = partial(gpu_attention._varlen_attn, repeats=False)
    monkeypatch.setattr(segment_attention, "varlen_kernel", lambda *_: kernel)
    rows = [
        torch.empty(1, sum(LENGTHS), heads, WIDTH, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for heads in (HEADS, key_heads, key_heads)
    ]
    leaves = [row.requires_grad_() for row in rows]
    given = segment_attention.segment_arguments(LENGTHS, rows[0].device)
    output, _ = segment_attention.segment_attention(torch.nn.Module(), *leaves, None, **given)
    assert output.shape == (1, sum(LENGTHS), HEADS, WIDTH)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_the_reason_for_the_loop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"now": (8, 0)}
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability["now"])

    def reason(dtype: torch.dtype = torch.bfloat16, width: int = WIDTH, kind: str = "cuda") -> str | None:
        return gpu_attention._why_not_pytorch(HeadShape(device=torch.device(kind, 0), dtype=dtype, width=width))

    assert reason() is None
    assert reason(torch.float16, width=256) is None
    assert "float32" in reason(torch.float32)
    assert "12 wide" in reason(width=12)
    assert "264 wide" in reason(width=264)
    assert "NVIDIA" in reason(kind="cpu")
    capability["now"] = (7, 5)
    assert "compute capability 7.5" in reason()


def test_attention_that_is_more_than_softmax_runs_on_eager() -> None:
    """Gemma 2 caps its scores; an attention that leaves this out trains another model."""
    config = transformers.Gemma2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=32, attn_logit_softcapping=0.1,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config)
    assert choose_attention(model).name == "eager"
    assert choose_attention(model, device=torch.device("cuda", 0)).name == "eager"
    model.set_attn_implementation(segment_attention.SEGMENTS)
    ids = torch.arange(5)[None]
    with pytest.raises(ConfigError, match=r"Gemma2Attention has softcap.*eager"):
        model(ids, **segment_attention.segment_arguments((5,), ids.device))
