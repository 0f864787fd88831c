"""The commit protocol: a checkpoint is whole or it does not count."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from between import just_before
from disk_trace import trace_disk
from trials import commit

from mm_moslora.training.checkpointing import checkpoint_folder
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, OtherFormatError, read_manifest
from mm_moslora.training.checkpointing.run_checkpoints import Retention, newest_valid, remove_old
from mm_moslora.utils import files
from mm_moslora.utils.errors import CheckpointError
from mm_moslora.utils.run_paths import adapter_folder, checkpoints, find_checkpoint


def write_files(folder):
    (folder / "trainer" / "rank-00000" / "state.bin").write_bytes(os.urandom(300))
    (folder / "adapter.safetensors").write_bytes(os.urandom(200))


def manifest(step):
    return Manifest(
        step=step, world_size=1, recipe={"optim": {"lr": 1e-4}}, base={}, counters={"steps": step}, trainable={},
        files={},
    )  # fmt: skip


def make(run, step):
    return commit(run, manifest(step), write_files)


def test_a_committed_checkpoint_reads_back(tmp_path):
    folder = make(tmp_path, 3)
    found = read_manifest(folder)
    assert found.step == 3
    assert set(found.files) == {"trainer/rank-00000/state.bin", "adapter.safetensors"}
    assert (tmp_path / "latest").read_text() == "checkpoint-000003"
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_power_loss_leaves_a_whole_checkpoint_or_none(tmp_path, monkeypatch):
    events = trace_disk(monkeypatch, tmp_path)
    make(tmp_path, 1)
    temporary = ".tmp-checkpoint-000001"
    committed = events.index(f"{temporary} -> checkpoint-000001")
    contents = ["", "/trainer", "/trainer/rank-00000", "/trainer/rank-00000/state.bin", "/adapter.safetensors"]
    assert {f"sync {temporary}{name}" for name in (*contents, "/.manifest.json~")} <= set(events[:committed])
    assert events[committed + 1] == "sync ."


def test_a_file_that_another_rank_left_incomplete_is_not_committed(tmp_path, monkeypatch):
    make(tmp_path, 1)
    path = tmp_path / ".tmp-checkpoint-000002" / "adapter.safetensors"
    just_before(monkeypatch, checkpoint_folder, "seal", lambda: os.truncate(path, 100), when=lambda *_: True)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors was written by another rank and is not complete"):
        make(tmp_path, 2)
    assert newest_valid(tmp_path)[1].step == 1


def test_a_damaged_checkpoint_of_the_same_step_is_put_aside(tmp_path):
    (make(tmp_path, 1) / "adapter.safetensors").write_bytes(b"")
    make(tmp_path, 1)
    assert newest_valid(tmp_path)[1].step == 1
    assert (tmp_path / "checkpoint-000001.corrupt" / "manifest.json").is_file()


def test_a_failed_write_leaves_the_earlier_checkpoint_and_no_trace(tmp_path):
    make(tmp_path, 1)

    def fail(folder):
        write_files(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*Earlier checkpoints are untouched"):
        commit(tmp_path, manifest(2), fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001", "latest"]
    assert newest_valid(tmp_path)[1].step == 1


@pytest.mark.parametrize("crash", ["write", "seal", "rename"])
def test_a_crash_at_any_moment_leaves_the_earlier_checkpoint_usable(tmp_path, crash):
    """A child process is killed inside the save, with SIGKILL."""
    make(tmp_path, 1)
    pid = os.fork()
    if pid == 0:

        def die(*_, **__):
            os.kill(os.getpid(), 9)

        if crash == "seal":
            files.replace_json = die
        if crash == "rename":
            files.rename = die
        commit(tmp_path, manifest(2), die if crash == "write" else write_files)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == 9
    assert newest_valid(tmp_path)[1].step == 1
    assert make(tmp_path, 2).name == "checkpoint-000002"
    assert newest_valid(tmp_path)[1].step == 2


@pytest.mark.parametrize("name", ["trainer/rank-00000/state.bin", "adapter.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_found_named_and_passed_over(tmp_path, name, damage, caplog):
    make(tmp_path, 1)
    folder = make(tmp_path, 2)
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        read_manifest(folder)
    assert newest_valid(tmp_path)[1].step == 1
    assert (tmp_path / "checkpoint-000002.corrupt").is_dir()
    assert name in caplog.text


def test_when_all_are_damaged_it_says_so_instead_of_starting_over(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "manifest.json").write_text("{")
    for _ in range(2):  # the same command again is no fresh start
        with pytest.raises(CheckpointError, match=r"All 1 checkpoints .*manifest\.json is damaged"):
            newest_valid(tmp_path)
    assert folder.is_dir()
    assert newest_valid(tmp_path / "empty") is None


@pytest.mark.parametrize("older_is_good", [True, False])
def test_checkpoints_of_another_version_are_never_renamed(tmp_path, older_is_good):
    folders = [make(tmp_path, step) for step in (1, 2)]
    for folder in folders[older_is_good:]:
        content = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**content, "format": 3, "version": "9.0"}))
    for _ in range(2):
        with pytest.raises(OtherFormatError, match=r"format 3, this version reads 2.*written by mm_moslora 9\.0"):
            newest_valid(tmp_path)
    assert [folder for _, folder in checkpoints(tmp_path)] == folders


@pytest.mark.parametrize("key", ["format", "step", "lr"])
def test_a_flipped_bit_of_a_manifest_is_damage_and_no_other_version(tmp_path, key):
    """This version writes one format only, so the one before is used."""
    make(tmp_path, 1)
    manifest = make(tmp_path, 2) / "manifest.json"
    content = manifest.read_bytes()
    place = content.index(f'"{key}": '.encode()) + len(f'"{key}": ')
    manifest.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert newest_valid(tmp_path)[1].step == 1


def test_a_disk_that_fills_up_after_the_rename_costs_the_hint_and_not_the_checkpoint(tmp_path, monkeypatch):
    real = files.replace_text

    def replace(path, text):
        if path.name == "latest":
            raise OSError(28, "No space left on device")
        real(path, text)

    monkeypatch.setattr(files, "replace_text", replace)
    assert make(tmp_path, 1) == newest_valid(tmp_path)[0]


@pytest.mark.parametrize("name", ["checkpoint-000001.corrupt", "checkpoint-000001.corrupt1", "checkpoint-500"])
def test_a_run_whose_checkpoints_were_put_aside_is_not_fresh(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name}, which was damaged, .*--resume never"):
        newest_valid(tmp_path)


def test_an_old_checkpoint_with_files_of_the_user_is_kept(tmp_path, caplog):
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint-000001" / "notes.txt").write_text("mine")
    remove_old(tmp_path, Retention(last=1))
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 3]
    assert (tmp_path / "checkpoint-000001" / "notes.txt").read_text() == "mine"
    assert "holds files that are not in its manifest (notes.txt)" in caplog.text


def test_a_folder_in_the_way_of_a_save_is_not_deleted(tmp_path):
    theirs = tmp_path / ".tmp-checkpoint-000001"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"in the way and is not deleted"):
        make(tmp_path, 1)
    assert (theirs / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("why", ["superseded", "superseded1", "corrupt"])
def test_a_checkpoint_that_was_put_aside_is_not_the_newest_of_its_run(tmp_path, why):
    """Whoever evaluates or exports the run gets the newest that counts."""
    for step in (4, 5, 999_999, 1_000_000):
        (make(tmp_path, step) / "adapter").mkdir()
    newest = tmp_path / "checkpoint-1000000"
    assert find_checkpoint(tmp_path) == newest
    for step in (999_999, 1_000_000):
        folder = tmp_path / f"checkpoint-{step}"
        folder.rename(f"{folder}.{why}")
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-000005"
    assert adapter_folder(tmp_path) == tmp_path / "checkpoint-000005" / "adapter"


def test_an_adapter_beside_named_ones_is_used_and_the_others_are_told(tmp_path, caplog):
    caplog.set_level("INFO", logger="mm_moslora")
    for folder in (tmp_path, tmp_path / "blue", tmp_path / "red"):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
    for find in (adapter_folder, find_checkpoint):
        caplog.clear()
        assert find(tmp_path) == tmp_path
        assert f"below it: blue, red. For one of those give its folder: {tmp_path / 'blue'}." in caplog.text
        caplog.clear()
        assert find(tmp_path / "red") == tmp_path / "red"
        assert not caplog.text


def test_every_kth_and_the_best_stay_and_nothing_goes_while_the_newest_is_damaged(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    kept = Retention(last=1, every=4, best="checkpoint-000002")
    (tmp_path / "checkpoint-000006" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
        remove_old(tmp_path, kept)
    assert len(checkpoints(tmp_path)) == 6
    make(tmp_path, 7)
    remove_old(tmp_path, kept)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4, 7]


def test_hosts_whose_processes_have_the_same_number_write_the_same_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    just_before(monkeypatch, Path, "replace", lambda: files.replace_text(path, "theirs"), when=lambda *_: True)
    files.replace_text(path, "ours")
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]
