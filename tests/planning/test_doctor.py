"""The doctor names what is wrong and what to do; it never falls over."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from between import just_before

from mm_moslora.config import Recipe, TrackConfig, load_recipe
from mm_moslora.planning import doctor
from mm_moslora.planning.doctor import USES, check_version, diagnose
from mm_moslora.utils.hardware import extensions_folder, stale_locks
from mm_moslora.utils.package_requirements import declared


@pytest.mark.parametrize(
    ("package", "version", "status", "words"),
    [
        ("deepspeed", "0.18.0", "bad", "below the lowest supported release (>=0.19.5,<1)"),
        ("deepspeed", "0.19.8", "ok", "0.19.8"),
        ("peft", "0.22.0", "warn", "outside the tested range"),
        ("transformers", "5.1.0", "bad", "below the lowest"),
        ("transformers", "5.24.0", "ok", ""),
        ("torch", "2.9.0+cu130", "bad", "below the lowest"),
        ("torch", "2.13.0+cpu", "ok", ""),
        ("peft", None, "bad", "not installed"),
        ("peft", "nonsense", "warn", "not a version"),
    ],
)
def test_versions_are_judged(package: str, version: str | None, status: str, words: str) -> None:
    finding = check_version(package, version)
    assert finding.status == status
    assert words in finding.detail
    assert bool(finding.remedy) == (status != "ok")


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name in packages else real(name))


def statuses(recipe: Recipe | None = None) -> dict[str, str]:
    return {finding.name: finding.status for finding in diagnose(None, recipe)}


def test_every_dependency_is_judged() -> None:
    assert {item.name for item in declared()} <= statuses().keys()
    assert {item.name for item in declared()} >= USES.keys()


def test_what_an_ordinary_run_does_without_is_not_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *USES, "transformers")
    found = statuses()
    assert {name for name in USES if found[name] != "warn"} == set()
    assert found["transformers"] == "bad"


def test_a_recipe_decides_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *USES, "bitsandbytes")
    found = statuses(load_recipe("quickstart_tune"))
    assert {name for name, status in found.items() if status == "bad"} == {"deepspeed", "tensorboard", "wandb"}
    assert found["timm"] == found["onnx"] == "ok"
    recipe = load_recipe("internlm2_7b_qmoslora", ["train.zero=none"])
    found = statuses(replace(recipe, track=TrackConfig(trackers=["wandb"])))
    assert {name for name, status in found.items() if status == "bad"} == {"bitsandbytes", "wandb"}


def test_a_recipe_names_settings_that_deepspeed_takes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = {
        zero: statuses(load_recipe("quickstart_tune", [f"train.zero={zero}"])) for zero in ("zero3_full", "zeropp")
    }
    assert [found[zero]["settings"] for zero in found] == ["ok", "bad"]
    assert statuses(load_recipe("quickstart_tune", ["train.zero=none"]))["settings"] == "ok"


def test_a_wrong_deepspeed_file_is_one_finding_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    file = tmp_path / "own.json"
    recipe = load_recipe("quickstart_tune", [f"train.zero={file}"])
    for zero, status in (
        ({"stage": "3"}, "ok"), ({"stage": 3, "offload_param": "cpu"}, "bad"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "bad"),
    ):  # fmt: skip
        file.write_text(json.dumps({"zero_optimization": zero}))
        assert statuses(recipe)["settings"] == status
    monkeypatch.setattr("mm_moslora.training.preflight.check_zero", lambda *_: 1 / 0)
    assert statuses(recipe)["engine"] == "bad"


def test_a_harmful_version_is_bad_only_where_it_is_used() -> None:
    assert check_version("deepspeed", "0.18.0", use="zero", needed=False).status == "warn"
    assert check_version("deepspeed", "0.18.0", use="zero", needed=True).status == "bad"


def test_locks_of_killed_builds_are_found_and_fresh_ones_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, fresh = tmp_path / "py311" / "op" / "lock", tmp_path / "py311" / "other" / "lock"
    for path in (old, fresh):
        path.parent.mkdir(parents=True)
        path.touch()
    os.utime(old, (0, 0))
    ending = tmp_path / "py311" / "ending"
    ending.mkdir()
    just_before(monkeypatch, os, "scandir", ending.rmdir, when=lambda path: Path(path) == ending)
    assert stale_locks(tmp_path) == [old]
    assert not ending.exists()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (finding,) = [finding for finding in diagnose(tmp_path) if finding.name == "build locks"]
    assert finding.status == "warn"
    assert str(old) in finding.remedy
    assert str(fresh) not in finding.remedy


def test_extension_cache_is_of_this_environment_alone_where_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extensions_folder({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")
    monkeypatch.setattr("mm_moslora.planning.doctor.os.access", lambda *_: True)
    assert extensions_folder({"HOME": "/home/me"}) == Path(sys.prefix) / "torch_extensions"
    monkeypatch.setattr("mm_moslora.planning.doctor.os.access", lambda *_: False)
    assert extensions_folder({"HOME": "/home/me"}) == Path("/home/me/.cache/torch_extensions")
    assert extensions_folder({"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/torch_extensions")


STEPS = """
import resource, sys, torch
from mm_moslora.utils.hardware import keep_freed_memory
asked = sys.argv[1:] == ["keep"] and keep_freed_memory()
def step():
    blocks = [torch.ones(4_000_000) for _ in range(4)]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(asked, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_this_environment_has_nothing_bad(tmp_path: Path) -> None:
    findings = diagnose(tmp_path / "not" / "yet")
    assert [finding for finding in findings if finding.status == "bad"] == []
    names = {finding.name for finding in findings}
    assert {"python", "torch", "accelerator", "bf16", "compiler", "disk for runs", "threads", "wandb login"} <= names
    assert len(names) == len(findings)


@pytest.mark.parametrize(("policy", "status"), [(None, "ok"), ("PASSIVE", "ok"), ("active", "warn")])
def test_only_a_shell_that_lets_threads_spin_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str | None, status: str
) -> None:
    """Without a policy of the shell, every verb sets the passive one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", policy) if policy else monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    (threads,) = (finding for finding in diagnose(tmp_path) if finding.name == "threads")
    assert threads.status == status
    assert ("unset OMP_WAIT_POLICY" in threads.remedy) == (status == "warn")


def test_one_broken_library_does_not_hide_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError(f"lib{name}.so is damaged")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    findings = {finding.name: finding for finding in diagnose(tmp_path)}
    assert findings["accelerator"].status == "bad"
    assert "libtorch.so is damaged" in findings["accelerator"].detail
    assert findings["python"].status == "ok"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_75", "sm_80", "sm_90"], (8, 6), True),
        (["sm_75", "sm_80", "sm_90"], (7, 0), False),
        (["sm_75", "sm_80", "sm_90"], (10, 0), False),
        (["sm_75", "sm_90a", "compute_90"], (10, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        ([], (8, 0), True),
    ],
)
def test_a_card_that_torch_has_no_kernels_for_is_told_apart(built, capability, runs):
    assert doctor._runs(built, capability) == runs
