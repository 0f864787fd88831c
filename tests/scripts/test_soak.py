"""The soak tests in small: the same code, fewer cases; and a check that they can fail."""

from __future__ import annotations

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
