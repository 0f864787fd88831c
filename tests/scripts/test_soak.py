"""The soak tests in small: the same code, fewer cases; and a check that they can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "scripts" / "soak"


@pytest.fixture(autouse=True)
def _soak_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SOAK))


def test_no_crash_of_the_commit_protocol_loses_a_checkpoint():
    import commit_protocol

    outcomes = commit_protocol.run(700)
    assert sum(outcomes.values()) == 700
    assert set(outcomes) == {"the last reported one", "one that was just being committed", "nothing yet"}


@pytest.mark.parametrize("forgotten", ["folders", "the parent"])
def test_the_simulated_disk_finds_a_protocol_that_forgets_to_sync(forgotten, monkeypatch):
    import commit_protocol
    from simulated_disk import SimulatedDisk

    real = SimulatedDisk.sync

    def sync(self, path):
        inner = any(part.startswith(".tmp") for part in path.parts)
        is_file = "." in path.name.removeprefix(".tmp")
        if is_file or inner != (forgotten == "folders"):
            real(self, path)

    monkeypatch.setattr(SimulatedDisk, "sync", sync)
    outcomes = commit_protocol.run(700)
    assert any(outcome.startswith(("lost", "unrecoverable")) for outcome in outcomes)


def test_every_flipped_bit_is_found(tmp_path):
    import bit_flips
    from commit_protocol import content_of, manifest
    from trials import commit

    from mm_moslora.training.checkpointing.checkpoint_folder import rank_folder

    def write(folder):
        (rank_folder(folder, 0) / "optimizer.safetensors").write_bytes(content_of(1, "state"))
        (folder / "config.yaml").write_bytes(content_of(1, "recipe"))

    folder = commit(tmp_path, manifest(1), write)
    assert bit_flips.run(300, folder) == {"found": 300}


def test_the_order_of_the_data_survives_ranks_workers_and_interruptions():
    import data_order

    assert set(data_order.run(range(60), with_workers=1)) == {"same samples, same order"}


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones(tmp_path, monkeypatch, python):
    monkeypatch.setenv("PYTHON", str(python.ours))  # of the ranks
    import sigkill
    from parts import Ledger

    monkeypatch.setattr(sigkill, "KILLS_PER_RUN", 3)
    monkeypatch.setattr(sigkill, "STEPS", 8)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    sigkill.run(2, tmp_path, stages=("zero2",), ledger=ledger)
    (finished,) = Ledger(tmp_path / "ledger.jsonl").entries
    assert finished["equal"]
    assert len(finished["moments"]) >= 2


@pytest.fixture
def chaos(monkeypatch, python):
    """The script, with a few kinds of faults in a short run."""
    monkeypatch.setenv("PYTHON", str(python.ours))  # of the ranks
    import chaos

    kinds = [
        "NaN in one rank's loss or gradient",
        "SIGKILL of one rank",
        "flipped bit",
        "clock of one rank jumps by an hour",
    ]
    monkeypatch.setattr(chaos, "kinds_of", lambda _: list(kinds))
    monkeypatch.setattr(chaos, "STEPS", 14)
    return chaos


@pytest.mark.slow
def test_a_run_in_chaos_ends_as_an_undisturbed_one(tmp_path, chaos):
    from parts import Ledger

    ledger = Ledger(tmp_path / "ledger.jsonl")
    chaos.run(4, tmp_path, seed=3, disk=tmp_path / "plain", ledger=ledger, chains=range(6, 7))
    (finished,) = Ledger(tmp_path / "ledger.jsonl").entries
    assert finished["equal"], finished
    assert len(finished["faults"]) >= 3
    assert not any(fault["wrong"] for fault in finished["faults"]), finished
    assert "| SIGKILL of one rank | 1 | ended 1 | 1 | 0 |" in chaos.table(ledger)


def test_a_run_that_differs_in_one_digit_or_weight_is_found(tmp_path, chaos):
    chain = chaos.Chain(0, 0, folder=tmp_path, disk=tmp_path, parts={})
    (chain.run / "checkpoint-000014").mkdir(parents=True)
    files = {"adapter/adapter_model.safetensors": {"sha256": "a"}, "trainer/rank-00000/optimizer.safetensors": {}}
    (chain.run / "checkpoint-000014" / "manifest.json").write_text(json.dumps({"files": files}))
    (chain.run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n')
    good = {1: (0.1).hex(), 2: (0.2).hex()}
    name = "adapter/adapter_model.safetensors"
    assert not chain.compare((good, {name: "a"}))
    assert chain.compare((good | {2: (0.2 + 1e-16).hex()}, {name: "a"})).startswith("losses of steps [2], by up to ")
    assert chain.compare((good, {name: "b"})) == f"weights: ['{name}']"
    chain.excused = {2}
    assert not chain.compare((good | {2: (0.3).hex()}, {name: "a"}))
