"""Dropout of the fused kernel on a CPU: kernels of ours and PyTorch's operators drop the same and compute the same."""

from __future__ import annotations

import pytest
import torch
from adapters.adapter_models import IDS, llama, train_a_bit
from native_kernels import needs_kernels
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mm_moslora import native
from mm_moslora.adapters import MoSLoRAConfig, add_moslora, dropout, use_native_kernels
from mm_moslora.adapters.dropout import KeptBits, Mask, exact_rate, kept_blocks
from mm_moslora.adapters.layer import FusedLinear
from mm_moslora.adapters.native_dropout import KeptNatively
from mm_moslora.models.elementwise import EAGER
from mm_moslora.models.kernels import Kernels, use_kernels
from mm_moslora.models.native_passes import NATIVE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
SHAPES = [(1, 1), (3, 5), (0, 6), (11, 37), (29, 100), (5, 16), (3, 2049)]
"""Odd widths, and rows that are no multiple of four or of a vector; with blocks of 400 entries most have several."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "_BLOCK", 400)


def masks(rates: list[float], *, natively: bool) -> dict[int, Mask | None]:
    return {
        place: Mask(rate=exact_rate(rate), seed=7 + place, native=natively) if rate else None
        for place, rate in enumerate(rates)
    }


def applied(rows: Tensor, rates: list[float], *, natively: bool) -> list[tuple[int, slice, Tensor]]:
    """What every mask makes of the rows: a copy, in place, and added to something."""
    found = []
    for place, block, kept in kept_blocks(rows, masks(rates, natively=natively)):
        if rates[place]:
            assert isinstance(kept, KeptNatively if natively else KeptBits)
        some = rows[block].contiguous()
        total = some.flip(0).clone() * 3
        kept.add(total, some.clone())
        parts = torch.stack([kept.keep(rows[block]), kept.keep_(some.clone()), total])
        found.append((place, block, parts.view(INTEGERS[rows.dtype])))
    assert found or not len(rows)
    return found


def assert_equal(rows: Tensor, rates: list[float]) -> None:
    ours, eager = (applied(rows, rates, natively=natively) for natively in (True, False))
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in eager]
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(ours, eager, strict=True))


@needs_kernels
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [2**-15, 0.05, 0.5, 1 - 2**-15])
def test_ours_drop_what_numpys_numbers_say_bit_for_bit(dtype: torch.dtype, shape: tuple[int, int], rate: float) -> None:
    torch.manual_seed(0)
    rows = torch.randn(*shape).to(dtype)
    rows[::2] *= 1e-39  # sums that bfloat16's own instruction would flush to 0
    odd = torch.tensor([torch.inf, -0.0, 1e-39, 2e-38, -torch.inf]).to(dtype)
    rows.view(-1)[: odd.numel()] = odd[: rows.numel()]
    assert_equal(rows, [rate])


@needs_kernels
@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_masks_that_are_drawn_together_are_those_that_are_drawn_alone(count: int) -> None:
    torch.manual_seed(0)
    rates = [0.0 if place == 1 else 0.05 * place + 0.1 for place in range(count)]
    assert_equal(torch.randn(43, 37), rates)


@needs_kernels
@DTYPES
@pytest.mark.parametrize("layout", ["every second", "columns", "a part", "one row many times"])
def test_rows_in_any_layout(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    rows = {
        "every second": lambda: torch.randn(26, 40)[::2],
        "columns": lambda: torch.randn(40, 13).t(),
        "a part": lambda: torch.randn(13, 90)[:, 7:47],
        "one row many times": lambda: torch.randn(1, 40).expand(13, 40),
    }[layout]()
    assert_equal(rows.to(dtype), [0.3, 0.2])


@needs_kernels
@DTYPES
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, before = torch.randn(70, 333).to(dtype), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(applied(rows, [0.1, 0.2], natively=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(*found, strict=True))


@needs_kernels
def test_what_the_kernels_do_not_take_goes_to_pytorchs_operators() -> None:
    rows, mask = torch.randn(5, 6), masks([0.5], natively=True)

    def used(given: Tensor) -> type:
        return type(next(kept_blocks(given, mask))[2])

    assert used(rows) is KeptNatively
    for given in (rows.half(), rows.double(), rows.to("meta")):
        assert used(given) is KeptBits
    with FlopCounterMode(display=False):
        assert used(rows) is KeptBits


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _model(dtype: torch.dtype) -> nn.Module:
    config = MoSLoRAConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    model = add_moslora(llama(dtype), config, autocast_adapter_dtype=False).train()
    train_a_bit(model)
    return model


@needs_kernels
@DTYPES
def test_a_models_gradients_are_the_same_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, add = _model(dtype), [], KeptNatively.add
    monkeypatch.setattr(KeptNatively, "add", lambda *args: calls.append(1) or add(*args))
    eager = _gradients(model)
    assert not calls
    assert use_native_kernels(model) == 10
    ours = _gradients(model)
    assert calls
    assert all(gradient.any() for gradient in eager.values())
    assert eager.keys() == ours.keys()
    assert all(torch.equal(eager[name], ours[name]) for name in eager)
    calls.clear()
    use_native_kernels(model, False)
    _gradients(model)
    assert not calls


def test_nothing_is_compiled_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise native.NativeError("there is no C++ compiler here")

    for module in ("layer", "native_dropout"):
        monkeypatch.setattr(f"mm_moslora.adapters.{module}.library", refused)
    model = _model(torch.float32)
    assert _gradients(model)
    with pytest.raises(native.NativeError, match=r"no C\+\+ compiler"):
        use_native_kernels(model)
    assert _gradients(model), "the layers are as they were"


@needs_kernels
def test_the_trainers_kernels_decide() -> None:
    model = _model(torch.float32).get_base_model()
    layers = [module for module in model.modules() if isinstance(module, FusedLinear)]
    for passes, ours in ((NATIVE, True), (EAGER, False), (EAGER, True)):
        use_kernels(model, Kernels(passes=passes, words="", native=ours))
        assert {layer.native for layer in layers} == {ours}
