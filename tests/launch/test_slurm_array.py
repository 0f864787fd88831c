"""The batch script of an array, each of its elements run by bash alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mm_moslora.launch.slurm_array import write_array
from mm_moslora.utils.errors import ConfigError
from tests.launch.test_jobs import CHECKOUT, job, starts


def test_an_element_runs_its_job_in_place_of_the_shell(tmp_path: Path) -> None:
    place = tmp_path / "it's $HOME; a b"
    jobs = [job(place, "works", "a", folder=tmp_path), job(place, "fails", "b", cards=2, cores=3)]
    write_array(tmp_path / "array.sbatch", jobs)
    text = (tmp_path / "array.sbatch").read_text()
    for line in ("--array=0-1", "--gpus-per-node=2", "--nodes=1 --ntasks=1 --cpus-per-task=3", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'eval'}"}
    for element, code in (("0", 0), ("1", 4), ("1", 4), ("7", 0)):
        process = subprocess.Popen(
            ["bash", tmp_path / "array.sbatch"], env={**environment, "SLURM_ARRAY_TASK_ID": element}
        )
        assert process.wait(60) == code
        if element == "0":
            assert starts(place, "a") == [[str(process.pid), os.environ.get("CUDA_VISIBLE_DEVICES", ""), str(tmp_path)]]
    assert (place / "a" / "output").exists()
    assert (place / "b" / "log.txt").read_text() == "this went wrong\n" * 2


def test_an_array_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No job is left"):
        write_array(tmp_path / "array.sbatch", [])
