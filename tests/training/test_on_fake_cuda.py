"""Training, decoding and scoring on a CUDA device that only checks: see `fake_cuda`.

A tensor on the wrong device is an error there. A wait of the host for the device stalls a GPU, so every one is counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch

TESTS = Path(__file__).parents[1]
OURS = ("bf16", "fp32", "reference kernel", "stock layers", "gradient checkpointing", "StelLA", "DoRA", "all weights",
        "adapter in the tower, checkpointed", "text", "feature cache")  # fmt: skip
READY_MADE = {"anyres": 2, "qwen2_5_vl": 19, "qwen3_vl": 29}
"""Waits in transformers' own code, per micro-batch; two layers of a tower have a part in those of Qwen."""
READ = "mm_moslora torch_engine.py _update: reads a value"
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch with CUDA has a device of its own")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake_cuda")
    library = fake_cuda.build(folder)
    command = (
        "import sys; from pathlib import Path; import fake_cuda; fake_cuda.load(Path(sys.argv[1])); "
        "import fake_cuda_worker; fake_cuda_worker.main(Path(sys.argv[2]))"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(TESTS / part) for part in ("support", "builders", "", "..", "../eval"))
    }
    done = subprocess.run(
        [sys.executable, "-c", command, str(library), str(folder)], capture_output=True, text=True, env=environment
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-4000:]
    return {line["case"]: line for line in lines}


def of(found, name):
    assert "error" not in found[name], found[name]["error"]
    return found[name]


@pytest.mark.parametrize("name", OURS)
def test_a_step_waits_for_the_device_once(found, name):
    case = of(found, name)
    assert case["step"]["waits"] == {READ: 1}
    assert case["applied"]


@pytest.mark.parametrize("name", READY_MADE)
def test_of_a_ready_made_model_only_its_own_code_waits(found, name):
    waits = dict(of(found, name)["step"]["waits"])
    assert waits.pop(READ) == 1
    assert all(place.startswith(("transformers", "elsewhere")) for place in waits), waits
    assert sum(waits.values()) <= 2 * READY_MADE[name]


def test_measuring_and_answering_wait_where_the_host_must_decide(found):
    case = of(found, "bf16")
    assert case["norms"]["waits"] == {"mm_moslora engine_base.py component_norms: reads a value": 1}
    assert case["evaluate"]["waits"] == {"mm_moslora engine_base.py evaluate: reads a value": 1}
    # A fork each for the shared beginning and, in scoring, for the options; then a token, or all scores, at a time.
    steps = 4
    assert case["generate"]["waits"] == {
        "mm_moslora prefix_cache.py _arrange: reads a value": 2,
        "mm_moslora prefix_cache.py _visible: reads a value": steps,
        "mm_moslora prefix_cache.py likeliest: reads a value": steps,
    }  # fmt: skip
    assert case["score"]["waits"]["mm_moslora generation.py score_options: reads a value"] == 2
    assert sum(case["score"]["waits"].values()) <= 8


def test_ready_made_models_answer(found):
    waits = of(found, "qwen2_5_vl")["generate"]["waits"]
    own = {place: count for place, count in waits.items() if place.startswith("mm_moslora")}
    assert own == {"mm_moslora prefix_cache.py join: reads a value": 2}


def test_segments_take_one_kernel_in_half_precision(found):
    half, wide = (of(found, name)["step"]["kernels"] for name in ("bf16", "fp32"))
    layers, batches = 2, 2
    assert half["_varlen_attn"] == half["_varlen_attn_backward"] == layers * batches
    segments = 4 + 2
    towers = wide["_scaled_dot_product_efficient_attention"] - layers * segments
    assert "_varlen_attn" not in wide
    assert towers == half["_scaled_dot_product_flash_attention"]


def test_a_lean_layer_does_not_wait(found):
    case = of(found, "one layer")
    assert not case["forward"]["waits"]
    assert not case["backward"]["waits"]


def test_the_gpu_benchmark_runs_there(found):
    case = of(found, "benchmark")
    assert case["ours"]["waits"] == {READ: 1}
    for name in ("ours", "hf-best"):  # the peer has the same attention
        assert case[name]["kernels"]["_varlen_attn"] == 2 * 2  # layers and micro-batches
    assert case["hf-best"]["waits"] == {}
    assert all(case[name]["kernels"] for name in ("hf", "decode-ours"))


def test_the_projector_is_fitted_there(found):
    of(found, "projector's fit")
