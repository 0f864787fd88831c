"""`model.kernels: native`: where the C++ attention runs, and how it is compiled."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from native_kernels import WHY_NOT, needs_kernels
from pass_checks import RunChecks, lean_model

from mm_moslora.config import ModelConfig, Recipe, TrainConfig
from mm_moslora.kernels import native
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.kernels.attention.segment_attention import NATIVE, SEGMENTS
from mm_moslora.models.memory_efficient.kernel_selection import attention_words, choose_kernels, use_kernels
from mm_moslora.planning import doctor
from mm_moslora.training.validation import whole_model
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.hardware import extensions_folder

CPU = torch.device("cpu")


LIBRARIES = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line]
"""Shared libraries that this process has loaded."""
COMPILED = extensions_folder(os.environ) / "mm_moslora"
"""Where other tests have the kernels."""
needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="there is no C++ compiler here")


@needs_kernels
class TestNative(RunChecks):
    name = "native"
    words = "Attention runs on the C++ kernel for CPUs"


@needs_kernels
@pytest.mark.parametrize(
    ("requested", "dtype", "words"),
    [
        ("auto", torch.float32, "the C++ kernel for CPUs ("),
        ("auto", torch.float16, "PyTorch's operators, which heads of 12 values in torch.float16 take on this CPU"),
        ("sdpa", torch.float32, "transformers' sdpa"), ("eager", torch.float32, "transformers' eager"),
    ],
)  # fmt: skip
def test_the_log_names_the_attention_that_this_model_takes(requested: str, dtype: torch.dtype, words: str) -> None:
    model, kernels = lean_model("llama", dtype), choose_kernels("auto", CPU)
    chosen = choose_attention(model, requested, device=CPU)
    set_attention(model, chosen.name, native=kernels.native)
    assert (chosen.words or attention_words(model, kernels)).startswith(words)
    assert use_kernels(model, kernels) == ""
    if requested != "auto":
        with pytest.raises(ConfigError, match=rf"kernels is 'native', but .* runs on the attention '{requested}'"):
            attention_words(model, choose_kernels("native", CPU))


def test_a_run_has_its_attention_back_after_generation() -> None:
    model = lean_model("llama", torch.float32)
    set_attention(model, SEGMENTS, native=True)
    run = SimpleNamespace(assembly=SimpleNamespace(model=model), engine=SimpleNamespace(gathered=nullcontext))
    with whole_model(run.engine, run.assembly.model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == NATIVE[SEGMENTS]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of compiled kernels, not there yet; other tests get those of the common folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    native.library.cache_clear()
    yield tmp_path / "compiled" / "mm_moslora"
    native.library.cache_clear()


@pytest.fixture(scope="module")
def whole() -> Path:
    """The kernels as other tests have them."""
    return native.library().path


@pytest.fixture
def remembering(whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that gives what it gave before, since it takes seconds; `test_a_processor_without_avx2` waits."""
    compiler, real = tmp_path / "remembering-c++", native.find_compiler()
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec "{real}" "$@"\nwhile [ "$1" != -o ]; do shift; done\n'
        f'sleep 0.2\nexec cp "{whole}" "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def test_the_sources_are_found() -> None:
    """Tests of the kernels are skipped where they do not compile."""
    assert {path.name for path in native.FOLDER.iterdir()} >= {"attention.cpp", "tiles.h", "vectors.h"}


@needs_kernels
def test_auto_is_ours_on_a_cpu_and_not_on_a_gpu() -> None:
    chosen = choose_kernels("auto", CPU)
    assert chosen.native
    assert chosen.words.startswith("the C++ kernel for CPUs (")
    assert not chosen.required
    assert not choose_kernels("auto", torch.device("cuda")).native
    with pytest.raises(ConfigError, match=r"kernels is 'native', but .* and the model runs on cuda\. It runs"):
        choose_kernels("native", torch.device("cuda"))


def test_without_a_compiler_auto_is_torch_and_native_is_refused(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    chosen = choose_kernels("auto", CPU)
    assert not chosen.native
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
        ("echo 'attention.cpp:1: error: no such flag' >&2; exit 1", "fails (attention.cpp:1: error: no such flag)"),
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
    assert not chosen.native
    assert reason in chosen.words
    assert not [path for path in fresh.rglob("*") if path.suffix != ".so"]


@needs_compiler
def test_a_folder_that_cannot_be_written_is_a_reason(fresh: Path) -> None:
    fresh.parent.touch()
    assert "nothing can be written to" in choose_kernels("auto", CPU).words


@needs_kernels
@pytest.mark.usefixtures("remembering")
def test_it_is_compiled_once_by_ranks_that_start_together(fresh: Path) -> None:
    code = "from mm_moslora.kernels import native; native.library(); native.library.cache_clear(); native.library()"

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
    Recipe(model=ModelConfig(language="x", kernels="native"), train=TrainConfig(compile="inductor"))
    with pytest.raises(ConfigError, match=r"'liger' and train\.compile is 'inductor'"):
        Recipe(model=ModelConfig(language="x", kernels="liger"), train=TrainConfig(compile="inductor"))


@needs_kernels
@pytest.mark.usefixtures("remembering")
@pytest.mark.parametrize("damage", ["text", "empty", "cut", "another library"])
def test_a_broken_library_is_compiled_again(fresh: Path, damage: str) -> None:
    whole = min((path for path in map(Path, LIBRARIES) if path.is_file()), key=lambda path: path.stat().st_size)
    content = {
        "text": b"not a library", "empty": b"", "cut": whole.read_bytes()[: whole.stat().st_size // 2],
        "another library": whole.read_bytes(),
    }[damage]  # fmt: skip
    fresh.mkdir(parents=True)
    for path in COMPILED.glob("kernels-*.so"):  # of this machine, and perhaps of other sources
        (fresh / path.name).write_bytes(content)
    names = sorted(path.name for path in fresh.iterdir())
    native.library()["attend_full"]
    assert sorted(path.name for path in fresh.iterdir()) == names
    assert sum(path.read_bytes() != content for path in fresh.iterdir()) == 1
