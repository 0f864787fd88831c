"""`model.kernels: native`: our kernels for CPUs, against PyTorch's operators, and how they are compiled."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from native_kernels import WHY_NOT, needs_kernels
from pass_checks import PassChecks, batch, drawn, lean_model, use
from torch.utils.flop_counter import FlopCounterMode

from mm_moslora import doctor, native
from mm_moslora.config import ModelConfig, Recipe, TrainConfig
from mm_moslora.errors import ConfigError
from mm_moslora.losses import head_loss_sum
from mm_moslora.models.elementwise import EAGER
from mm_moslora.models.kernels import choose_kernels
from mm_moslora.models.native_passes import NATIVE
from mm_moslora.models.vlm import supervised_hidden

CPU = torch.device("cpu")


LIBRARIES = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line]
"""Shared libraries that this process has loaded."""
needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="there is no C++ compiler here")


@needs_kernels
class TestNative(PassChecks):
    passes = NATIVE
    name = "native"
    words = "ours for CPUs"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of compiled kernels, not there yet; other tests get those of the common folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    native.library.cache_clear()
    yield tmp_path / "compiled" / "mm_moslora"
    native.library.cache_clear()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    e, g = drawn(70, 333, dtype=dtype), drawn(70, 333, dtype=dtype)
    weight, heads = drawn(333, dtype=dtype), drawn(70, 3, 24, dtype=dtype)
    turn = drawn(70, 1, 24, dtype=dtype)

    def everything() -> list[torch.Tensor]:
        y, inverse = NATIVE.normalise(e, weight, 1e-5)
        gradients = NATIVE.gated_backward(g.clone(), e, g, e)
        back = NATIVE.normalise_backward(g, e, weight, inverse)
        return [y, inverse, back, NATIVE.gated(e, g), *gradients, NATIVE.rotated(heads, turn, turn)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(3)
        several = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_at_the_edge(dtype: torch.dtype) -> None:
    e = torch.tensor([0.0, -0.0, 1e4, -1e4, 88.0, -88.0, 3e38, -3e38, torch.inf, torch.nan]).to(dtype)
    ones = torch.ones_like(e)
    found, eager = NATIVE.gated(e, ones), EAGER.gated(e, ones)
    torch.testing.assert_close(found, eager, rtol=1e-2, atol=1e-30, equal_nan=True)
    y, _ = NATIVE.normalise(torch.full((1, 5), torch.nan, dtype=dtype), ones[:5], 1e-5)
    assert y.isnan().all()
    y, _ = NATIVE.normalise(torch.zeros(1, 5, dtype=dtype), ones[:5], 1e-5)
    assert not y.any()


@needs_kernels
@pytest.mark.parametrize("layout", ["every second", "columns", "a part"])
def test_rows_in_any_layout(layout: str) -> None:
    torch.manual_seed(0)
    x = {
        "every second": lambda: torch.randn(6, 40)[::2],
        "columns": lambda: torch.randn(40, 3).t(),
        "a part": lambda: torch.randn(3, 90)[:, 7:47],
    }[layout]()
    weight, grad = torch.randn(80)[::2], torch.randn(40, 3).t()
    y, inverse = NATIVE.normalise(x, weight, 1e-5)
    torch.testing.assert_close(y, EAGER.normalise(x, weight, 1e-5)[0])
    eager = EAGER.normalise_backward(grad, x, weight, inverse)
    torch.testing.assert_close(NATIVE.normalise_backward(grad, x, weight, inverse), eager)
    torch.testing.assert_close(NATIVE.gated(x, grad), EAGER.gated(x, grad))


@needs_kernels
def test_other_dtypes_and_counters_see_pytorchs_operators() -> None:
    e, g = torch.randn(3, 20, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    assert torch.equal(NATIVE.gated(e, g), EAGER.gated(e, g))
    assert torch.equal(NATIVE.gated(e.half(), g.half()), EAGER.gated(e.half(), g.half()))
    e, g = e.float(), g.float()
    assert not torch.equal(NATIVE.gated(e, g), EAGER.gated(e, g)), "the same to the last bit: not our kernel?"
    with FlopCounterMode(display=False):
        assert torch.equal(NATIVE.gated(e, g), EAGER.gated(e, g))
    assert NATIVE.gated(e.to("meta"), g.to("meta")).device.type == "meta"


@needs_kernels
def test_a_graph_that_is_kept_gives_its_gradients_twice() -> None:
    model = lean_model("llama", torch.float32)
    use(model, NATIVE)
    given = batch()
    loss = head_loss_sum(model, supervised_hidden(model, given), given.targets)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, trained), strict=True))


@needs_kernels
def test_auto_is_ours_on_a_cpu_and_not_on_a_gpu() -> None:
    chosen = choose_kernels("auto", CPU)
    assert chosen.passes is NATIVE
    assert chosen.words.startswith("ours for CPUs (")
    assert not chosen.required
    assert choose_kernels("auto", torch.device("cuda")).passes is EAGER
    with pytest.raises(ConfigError, match=r"kernels is 'native', but .* and the model runs on cuda\. They run"):
        choose_kernels("native", torch.device("cuda"))


def test_without_a_compiler_auto_is_torch_and_native_is_refused(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    chosen = choose_kernels("auto", CPU)
    assert chosen.passes is EAGER
    assert chosen.words.startswith("PyTorch's (there is no C++ compiler here (c++, g++, clang++")
    with pytest.raises(ConfigError, match=r"'native', but there is no C\+\+ compiler.*Or set model\.kernels to auto"):
        choose_kernels("native", CPU)
    assert not fresh.exists()
    (finding,) = (item for item in doctor.diagnose() if item.name == "kernels")
    assert finding.detail.startswith("PyTorch's own run between")


@needs_compiler
def test_a_processor_without_avx2_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() in ("x86_64", "AMD64"):
        monkeypatch.setattr(native, "FLAGS", tuple(flag for flag in native.FLAGS if "native" not in flag))
    else:
        assert WHY_NOT is not None
    assert "the processor has no AVX2" in choose_kernels("auto", CPU).words


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'passes.cpp:1: error: no such flag' >&2; exit 1", "fails (passes.cpp:1: error: no such flag)"),
        ("exit 3", "fails (exit code 3)"),
        ('while [ "$1" != -o ]; do shift; done; echo nothing > "$2"', "does not load"),
    ],
)
def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\n{script}\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    chosen = choose_kernels("auto", CPU)
    assert chosen.passes is EAGER
    assert reason in chosen.words
    assert not [path for path in fresh.rglob("*") if path.suffix != ".so"]


@needs_compiler
def test_a_folder_that_cannot_be_written_is_a_reason(fresh: Path) -> None:
    fresh.parent.touch()
    assert "nothing can be written to" in choose_kernels("auto", CPU).words


@needs_kernels
def test_it_is_compiled_once_by_ranks_that_start_together(fresh: Path) -> None:
    code = "from mm_moslora import native; native.library(); native.library.cache_clear(); native.library()"

    def start(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, range(2)))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    (path,) = fresh.iterdir()
    written = path.stat().st_mtime_ns
    assert start(0).returncode == 0
    assert path.stat().st_mtime_ns == written


def test_what_cannot_go_together_is_refused() -> None:
    ModelConfig(language="x", kernels="native", lean_layers=False)  # attention has a kernel, too
    with pytest.raises(ConfigError, match=r"kernels is 'liger', but model\.lean_layers is false"):
        ModelConfig(language="x", kernels="liger", lean_layers=False)
    with pytest.raises(ConfigError, match=r"'native' and train\.compile is 'inductor'"):
        Recipe(model=ModelConfig(language="x", kernels="native"), train=TrainConfig(compile="inductor"))


@needs_compiler
@pytest.mark.parametrize("damage", ["text", "empty", "cut", "another library"])
def test_a_broken_library_is_compiled_again(fresh: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = min((path for path in map(Path, LIBRARIES) if path.is_file()), key=lambda path: path.stat().st_size)
    content = {
        "text": b"not a library", "empty": b"", "cut": whole.read_bytes()[: whole.stat().st_size // 2],
        "another library": whole.read_bytes(),
    }[damage]  # fmt: skip
    real, compiled = native._run, []

    def run(command: list[str]) -> str:
        if "--version" not in command:
            compiled.append(command)
        return real(command)

    monkeypatch.setattr(native, "_run", run)
    fresh.mkdir(parents=True)
    words = real([str(native.find_compiler()), "--version"]).splitlines()[0]
    (fresh / f"kernels-{native._fingerprint(words)}.so").write_bytes(content)
    native.library()["gated_full"]
    assert compiled
    assert len(list(fresh.iterdir())) == 1
