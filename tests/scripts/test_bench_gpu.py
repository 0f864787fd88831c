"""The GPU benchmark in miniature on a CPU: rows, what a second call does, failures, budgets, and the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preloaded import Preloaded

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import gpu
import gpu_batches
import gpu_measure
import gpu_models
import gpu_table
from gpu_contenders import BY_NAME, CONTENDERS

BENCH = Path(gpu.__file__).parent
H100 = "NVIDIA H100 80GB HBM3"


def figures(**changes):
    return {
        "seconds": 0.9, "tokens_per_second": 14_800.0, "mfu": 0.44, "steps": 10, "tokens": [13_000] * 3,
        "peak_memory_gib": 60.0, "micro_batches": 1, "profile": {"kernels": 5000, "busy": 0.98}, "first_loss": 10.4,
        "full": {"seconds": 1.1, "tokens_per_second": 14_900.0}, "peak_tflops": 790.0, "copy_tbs": 3.0,
        "date": "2026-12-01T00:00:00+00:00",
    } | changes  # fmt: skip


def row(name: str, **changes):
    return gpu.key_of(BY_NAME[name], "llava-1.5-7b", H100) | figures(**changes)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """The contenders that were measured; what each gives is `figures`, or what the test puts into `gives`."""
    found = SimpleNamespace(names=[], gives={}, seconds=0.0)
    monkeypatch.setattr(gpu, "card_of", lambda device: H100)
    monkeypatch.setattr(gpu, "end_with_parent", lambda: None)
    monkeypatch.setattr(gpu, "version_of", lambda package: "1.0")
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: found.seconds))  # nobody else's clock

    def measure(contender, shape, device, seconds):
        found.names.append(contender.name)
        found.seconds += 40.0
        return found.gives.get(contender.name, figures()) | {"process_seconds": 40.0}

    monkeypatch.setattr(gpu, "measure", measure)
    return found


def test_two_contenders_run_on_a_cpu_and_a_second_call_measures_nothing(python: Preloaded, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [
        python.ours, str(BENCH / "gpu.py"), "--shape", "tiny", "--device", "cpu", "--only", "hf", "ours", "--out",
        str(out),
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    rows = {one["contender"]: one for one in map(json.loads, out.read_text().splitlines())}
    assert rows.keys() == {"hf", "ours"}
    for found in rows.values():
        assert "error" not in found, found
        assert found["gradients"]["median"] < 0.02  # of bf16
        assert found["profile"]["kernels"] > 1000
        assert found["full"]["tokens"] == [512]
    losses = [found["first_loss"] for found in rows.values()]
    assert max(losses) - min(losses) < 5e-3
    with out.open("a") as stream:
        stream.write('{"shape": "tin')  # a process was killed here
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.stdout == first.stdout
    assert "2 of 2 rows are there" in second.stderr


def test_a_contender_that_fails_is_a_row_and_the_rest_goes_on(started, tmp_path: Path, capsys) -> None:
    started.gives["hf"] = {"error": "OutOfMemoryError: too little"}
    arguments = ["--out", str(tmp_path / "rows.jsonl"), "--only", "hf", "ours"]
    assert gpu.main(arguments) == 0
    assert "- hf: failed, OutOfMemoryError: too little" in capsys.readouterr().out
    assert gpu.main(arguments) == 0
    assert started.names == ["hf", "ours"]
    started.gives.clear()
    assert gpu.main([*arguments, "--retry"]) == 0
    assert started.names == ["hf", "ours", "hf"]


def test_no_contender_starts_without_time_for_it(started, tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "rows.jsonl"), "--budget", "110"]
    assert gpu.main(arguments) == gpu.AGAIN
    assert started.names == ["ours", "hf-best"]  # 40 seconds each, and then 30 are left
    assert gpu.main(arguments) == gpu.AGAIN
    assert started.names == [contender.name for contender in CONTENDERS[:4]]


def test_other_versions_and_sources_are_measured_again(
    started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--out", str(tmp_path / "rows.jsonl"), "--only", "hf", "ours", "ours-zero1"]
    gpu.main(arguments)
    monkeypatch.setattr(gpu, "sources", lambda: "other")
    gpu.main(arguments)
    assert started.names == ["hf", "ours", "ours-zero1", "ours", "ours-zero1"]
    monkeypatch.setattr(gpu, "measuring", lambda: "other")
    gpu.main(arguments)
    assert started.names[5:] == ["hf", "ours", "ours-zero1"]
    monkeypatch.setattr(gpu, "version_of", lambda package: None if package == "deepspeed" else "1.0")
    gpu.main(arguments)  # a row says that DeepSpeed is not installed
    assert started.names[8:] == []
    assert "left_out" in (tmp_path / "rows.jsonl").read_text().splitlines()[-1]


def test_an_interrupt_keeps_the_rows_and_says_so(started, tmp_path: Path, monkeypatch, caplog) -> None:
    arguments = ["--out", str(tmp_path / "rows.jsonl"), "--only", "hf", "ours"]
    measure = gpu.measure

    def interrupted(contender, *rest):
        if contender.name == "ours":
            raise KeyboardInterrupt
        return measure(contender, *rest)

    monkeypatch.setattr(gpu, "measure", interrupted)
    caplog.set_level("INFO")
    assert gpu.main(arguments) == 130
    assert f"Interrupted: 1 rows are in {tmp_path / 'rows.jsonl'}; the same command goes on." in caplog.text
    monkeypatch.setattr(gpu, "measure", measure)
    assert gpu.main(arguments) == 0
    assert started.names == ["hf", "ours"]


def test_a_process_that_dies_or_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    monkeypatch.setattr(gpu.sys, "executable", str(script))
    script.write_text("#!/bin/sh\necho 'no such kernel' >&2; exit 3\n")
    script.chmod(0o755)
    assert gpu.measure(BY_NAME["hf"], "tiny", "cpu", 1.0)["error"] == "exit code 3: no such kernel"
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    assert gpu.measure(BY_NAME["hf"], "tiny", "cpu", 0.0)["error"].startswith("killed after 0 s")


def test_a_killed_contender_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caches are warm then."""
    tried = []

    def killed(contender: Any, *_: Any) -> dict[str, Any]:
        tried.append(contender.name)
        return {"error": "killed after 90 s: compiling", "killed": contender.name == "ours", "process_seconds": 0.1}

    monkeypatch.setattr(gpu, "measure", killed)
    arguments = [
        "--out", str(tmp_path / "rows.jsonl"), "--only", "hf", "ours", "--shape", "tiny", "--device", "cpu",
    ]  # fmt: skip
    assert [gpu.main(arguments) for _ in range(3)] == [gpu.AGAIN, 0, 0]
    assert tried == ["hf", "ours", "ours"]


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    for content in ("not JSON\n", '{"benchmark": "train"}\n', "[1]\n"):
        (tmp_path / "rows").write_text(content)
        with pytest.raises(SystemExit, match="holds no rows of this script"):
            gpu.read_rows(tmp_path / "rows")


def test_the_table_shows_predictions_beside_measurements_and_targets(tmp_path: Path) -> None:
    rows = [
        row("ours", seconds=2.0), row("ours", seconds=0.85, tokens_per_second=15_600.0),
        row("hf-best", seconds=1.0, full={"error": "OutOfMemoryError: too little"}),
        row("hf-best-checkpointing", seconds=1.19),
        row("ours-dropout", seconds=0.90), row("decode-vllm", left_out="vllm is not installed"),
    ]  # fmt: skip
    del rows[-1]["seconds"]
    text = gpu_table.table(rows, gpu_table.PREDICTIONS)
    assert "| ours | 0.850 | 0.80 to 0.88 | 15,600 | 15,000 to 16,800 |" in text  # the last row of a contender counts
    assert "| hf-best | 1.000 | 1.10 to 1.20 |" in text
    assert "| time of the best peer over `ours` | 1.18 | >= 1.3 |" in text
    assert "| dropout, share of a step | 0.059 | <= 0.06 |" in text
    assert "MoSLoRA over LoRA" not in text  # one side is missing
    assert "- hf-best: full failed, OutOfMemoryError: too little" in text
    assert "- decode-vllm: left out, vllm is not installed" in text
    assert "none of these figures is a measurement" in text
    elsewhere = [one | {"card": "NVIDIA A100-SXM4-80GB"} for one in rows]
    assert "0.80 to 0.88" not in gpu_table.table(elsewhere, gpu_table.PREDICTIONS)


def test_mfu_is_told_over_the_data_sheet_and_over_the_measured_product_with_a_target_each() -> None:
    """1.05 s for 380 TFLOP are 0.37 of 989 TFLOP/s and 0.45 of a product at 798: the target is missed in both."""
    slow = row("ours", seconds=1.05, tokens_per_second=12_600.0, mfu=380 / 1.05 / 798, peak_tflops=798.0)
    text = gpu_table.table([slow], gpu_table.PREDICTIONS)
    assert "| tokens/s | predicted | MFU, data sheet | predicted | MFU, measured product |" in text
    assert "| 12,600 | 15,000 to 16,800 | 0.366 | 0.44 to 0.48 | 0.454 |" in text
    assert "| useful MFU, data sheet | 0.366 | >= 0.45 |" in text
    assert "| useful MFU, measured product | 0.454 | >= 0.56 |" in text
    unknown = gpu_table.table([slow | {"card": "another"}], gpu_table.PREDICTIONS)
    assert "| 12,600 |  |  |  | 0.454 |" in unknown
    assert "useful MFU, data sheet" not in unknown


def test_predictions_agree_with_each_other_on_the_batches_of_the_benchmark() -> None:
    shape = gpu_batches.SHAPES["llava-1.5-7b"]
    predicted = json.loads(gpu_table.PREDICTIONS.read_text())["shapes"]["llava-1.5-7b"]["ours"]
    batches, _ = gpu_batches.batches_of(shape)
    tokens = sum(len(example.input_ids) for batch in batches for example in batch) / 3
    flops = sum(gpu_models.needed_flops(shape, shape.rank, batches)) / 3
    for seconds, speed, mfu in zip(
        predicted["seconds"], reversed(predicted["tokens_per_second"]), reversed(predicted["mfu"]), strict=True
    ):
        assert tokens / seconds == pytest.approx(speed, rel=0.015)
        assert flops / seconds / 989e12 == pytest.approx(mfu, abs=0.006)


def test_decoding_is_a_table_of_its_own() -> None:
    one = gpu.key_of(BY_NAME["decode-ours"], "1b", H100) | {
        "decoding": {"1": {"seconds": 1, "tokens_per_second": 128.0, "first_token_seconds": 0.02}, "8": {"error": "no"}}
    }
    assert "| decode-ours | 128, 0.020 | no |" in gpu_table.table([one], gpu_table.PREDICTIONS)


def test_batches_are_like_those_of_llava() -> None:
    shape = gpu_batches.SHAPES["llava-1.5-7b"]
    batches = gpu_batches.lengths_of(shape)
    assert all(12_500 < sum(batch) < 14_000 for batch in batches)
    assert max(len(batch) * max(batch) / sum(batch) for batch in batches) < 1.3  # padded rows waste little
    items = gpu_batches.examples(shape, batches[0], seed=0)
    parts = gpu_batches.split(items, 4)
    assert sorted(item.id for part in parts for item in part) == sorted(item.id for item in items)
    sums = [sum(item.length for item in part) for part in parts]
    assert max(sums) < 1.2 * min(sums)


def test_a_batch_that_does_not_fit_is_split_until_it_does() -> None:
    tried = []

    def work(parts: int) -> dict[str, int]:
        tried.append(parts)
        if parts < 4:
            raise torch.OutOfMemoryError("Tried to allocate")
        return {"parts": parts}

    cpu = torch.device("cpu")
    assert gpu_measure.in_fewest_parts(cpu, work) == {"parts": 4}
    assert tried == [1, 2, 4]
    with pytest.raises(torch.OutOfMemoryError):
        gpu_measure.in_fewest_parts(cpu, lambda parts: work(0))


def test_busy_time_counts_kernels_at_the_same_time_once() -> None:
    assert gpu_measure.covered([(5, 6), (0, 2), (1, 3), (1.5, 1.6)]) == 4
    assert gpu_measure.covered([]) == 0
