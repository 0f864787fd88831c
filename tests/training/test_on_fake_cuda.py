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
OURS = ("bf16", "adapter in the tower, checkpointed", "all weights", "text", "feature cache")
READ = "mm_moslora step_result.py tolist: waits for a copy"
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
        "LOCAL_RANK": "1",  # of a launcher that gives every rank its own GPU
        "PYTHONPATH": os.pathsep.join(str(TESTS / part) for part in ("support", "builders", "", "..", "../eval")),
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
def test_a_step_is_queued_without_a_wait_and_read_with_one(found, name):
    case = of(found, name)
    assert case["queued"] == {}
    assert case["step"] == {READ: 1}
    assert case["applied"]


def test_of_a_ready_made_model_only_its_own_code_waits(found):
    waits = of(found, "qwen2_5_vl")["queued"]
    assert all(place.startswith(("transformers", "elsewhere")) for place in waits), waits


def test_measuring_and_answering_wait_where_the_host_must_decide(found):
    case = of(found, "bf16")
    assert case["norms"] == {READ: 1}
    assert case["evaluate"] == {"mm_moslora engine_base.py evaluate: reads a value": 1}
    tokens, forks = 4, 2
    assert sum(case["generate"].values()) <= 2 * tokens + forks
    assert sum(case["score"].values()) <= 2 + 3 * forks


def test_ready_made_models_answer(found):
    own = {place for place in of(found, "qwen2_5_vl")["generate"] if place.startswith("mm_moslora")}
    assert own == {"mm_moslora prefix_cache.py join: reads a value"}


def test_the_projector_is_fitted_there(found):
    of(found, "projector's fit")


def test_a_gpu_beyond_the_last_is_refused(found):
    case = of(found, "beyond the last")
    assert case["told"] == dict.fromkeys(("set_device", "new", "moved"), "CUDA error: invalid device ordinal")
    assert case["device"] == "cuda:0"
