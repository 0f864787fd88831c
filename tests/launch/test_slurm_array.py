"""The batch script of an array, each of its elements run by bash alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from mm_moslora.launch.jobs import write_array
from mm_moslora.utils.errors import ConfigError
from tests.launch.job_runs import CHECKOUT, job, starts


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


@pytest.mark.parametrize("cards", [0, 2])
def test_a_script_is_replaced_only_as_it_was_written(tmp_path: Path, cards: int) -> None:
    file, jobs = tmp_path / "array.sbatch", [job(tmp_path, "works", name, cards=cards) for name in "ab"]
    write_array(file, jobs)
    write_array(file, jobs[:1])
    own = file.read_text()
    assert "--array=0-0\n" in own
    (tmp_path / "mine").write_text("mine")
    for text in ("mine", "", own.replace("#SBATCH --requeue", "#SBATCH --partition=gpu\n#SBATCH --requeue"),
                 own.replace("export", "module load cuda\nexport")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"array\.sbatch exists and is not replaced"):
            write_array(file, jobs)
        assert file.read_text() == text
    file.unlink()
    file.symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="not replaced"):
        write_array(file, jobs)
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_jobs_have_the_threads_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    tells = "import os; print(*map(os.environ.get, ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')))"
    (tmp_path / "tells.py").write_text(tells)
    one = dataclasses.replace(job(tmp_path, "works"), command=("tells",))
    write_array(tmp_path / "array.sbatch", [one])
    elsewhere = {**os.environ, "OMP_NUM_THREADS": "7", "PYTHONPATH": str(tmp_path), "SLURM_ARRAY_TASK_ID": "0"}
    subprocess.run(["bash", tmp_path / "array.sbatch"], check=True, env=elsewhere)
    assert one.log.read_text() == "3 None\n"


def test_an_array_is_submitted_from_any_folder(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_array(
        tmp_path / "array.sbatch", [dataclasses.replace(job(place, "fails", "b", folder=tmp_path), log=Path("b/log"))]
    )
    subprocess.run(
        ["bash", tmp_path / "array.sbatch"], check=False, cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'eval'}", "SLURM_ARRAY_TASK_ID": "0"},
    )  # fmt: skip
    assert (tmp_path / "b" / "log").read_text() == "this went wrong\n"
    assert not list(elsewhere.iterdir())


def test_an_array_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No job is left"):
        write_array(tmp_path / "array.sbatch", [])
