"""`mm-moslora launch` chooses the launcher that fits, hands signals on, and says how the run ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from unittest import mock

import psutil
import pytest
from between import just_before
from waiting import wait_until

from mm_moslora import cli
from mm_moslora.launch import child_processes, launcher, slurm_job, topology
from mm_moslora.launch.child_processes import keep_rank_log, run_and_hand_on
from mm_moslora.launch.launcher import exported_lines
from mm_moslora.launch.slurm_job import Requeue, SlurmJob
from mm_moslora.launch.topology import Topology, command
from mm_moslora.training.supervision.run_folder import exclusive
from mm_moslora.training.supervision.stop_signals import Stopped
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, DistributedError


def joined(places: Topology) -> str:
    return " ".join(command(places, ["train", "r.yaml", "--optim.lr", "1e-4"]))


def test_the_launcher_follows_from_the_places(monkeypatch, tmp_path):
    monkeypatch.setattr(topology, "accelerators", lambda: 4)
    rank = f"{sys.executable} -P -u -m mm_moslora train r.yaml --optim.lr 1e-4"
    assert f"--nproc_per_node 4 --standalone {rank}" in joined(Topology())
    monkeypatch.setattr(topology, "accelerators", lambda: 0)
    assert joined(Topology()).endswith("-m mm_moslora train r.yaml --optim.lr 1e-4")
    assert "torch.distributed.run" not in joined(Topology())
    assert "--max_restarts 3 --nproc_per_node 1 --standalone" in joined(Topology(max_restarts=3))
    two = joined(Topology(nnodes=2, rdzv="node-1:29400"))
    assert "--rdzv_backend c10d" in two
    assert "--nnodes 2 " in two
    assert f"--rdzv_endpoint node-1:29400 --rdzv_id mm-moslora {sys.executable} -P" in two
    named = joined(Topology(nnodes=2, rdzv="node-1:29400", rdzv_id="second", local_addr="10.0.0.2", nproc=2))
    assert "--nproc_per_node 2 " in named
    assert f"--rdzv_id second --local_addr 10.0.0.2 {sys.executable} -P" in named
    hosts = tmp_path / "hosts"
    hosts.write_text("worker-1 slots=8\n")
    monkeypatch.setenv("MASTER_PORT", "12345")
    runner = "deepspeed.launcher.runner --master_port 12345 --no_local_rank"
    assert f"{runner} --hostfile {hosts} --module mm_moslora train" in joined(Topology(hostfile=hosts))
    assert f"{runner} --num_gpus 2 --module" in joined(Topology(deepspeed=True, nproc=2))


def test_hosts_are_no_options_of_ssh(tmp_path):
    hosts = tmp_path / "hosts"
    for name in ("-oProxyCommand=touch${IFS}MARK", "-V"):
        hosts.write_text(f"worker-1 slots=8\n{name} slots=1\n")
        with pytest.raises(ConfigError, match=f"holds '{name[:2]}.*expected lines such as 'worker-1 slots=8'"):
            Topology(hostfile=hosts)
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        Topology(nnodes=2, rdzv="-oProxyCommand=x:22")


def test_a_host_file_leaves_the_working_folder_off_the_module_path(monkeypatch, tmp_path, caplog):
    """DeepSpeed would put it there, and read variables such as LD_PRELOAD from a file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("LD_PRELOAD=./evil.so\n")
    assert exported_lines({}) == "PYTHONPATH=\n"
    assert ".deepspeed_env of this folder is not read" in caplog.text
    assert exported_lines({"PYTHONPATH": "/a:/b"}).endswith("PYTHONPATH=/a:/b\n")
    assert "LD_PRELOAD=./evil.so\n" in exported_lines({"DS_ENV_FILE": ".deepspeed_env"})


def test_ranks_run_in_containers_and_behind_scripts(slurm_tools, monkeypatch):
    words = ("apptainer", "exec", "--bind", "/a b:/data", "image.sif")
    inside = Topology(nproc=1, through=words, python="python3")
    assert command(inside, ["train"]) == [*words, "python3", "-P", "-u", "-m", "mm_moslora", "train"]
    job = Topology(nproc=8, job=job_of(), through=("./with-modules.sh",), srun=("--container-image=x",))
    torchrun = f"{sys.executable} -P -m torch.distributed.run --no-python --nproc"
    assert f"--container-image=x ./with-modules.sh {torchrun}" in joined(job)
    assert cli.run(["launch", "--dry-run", "--through", "apptainer exec 'image", "quickstart_tune"]) == 1


def test_what_the_hosts_of_a_host_file_get(monkeypatch, tmp_path, caplog):
    """DeepSpeed writes `export NAME="value"; ` for a shell on the host."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/scratch/hf\n\nOWN=1\n")
    given = {
        "HF_HOME": "/home/hf", "HF_TOKEN": "hf_secret", "WANDB_NOTES": 'costs $5 or "more" \\ `x`',
        "GLOO_SOCKET_IFNAME": "ib0",
        "MM_MOSLORA_MODELS": "/a b", "OMP_NUM_THREADS": "4", "PATH": "/bin", "HF_ODD": "two\nlines",
    }  # fmt: skip
    lines = exported_lines(given)
    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    for line in lines.splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    shell = subprocess.run(["bash", "-c", f"{exports} env -0"], env={}, capture_output=True, text=True, check=True)
    got = dict(word.split("=", 1) for word in shell.stdout.split("\0") if word)
    expected = given | {"HF_HOME": "/scratch/hf", "OWN": "1"}
    for name in ("HF_TOKEN", "PATH", "HF_ODD"):
        assert got.get(name) != given[name]
        del expected[name]
    assert expected.items() <= got.items()
    assert "HF_ODD, HF_TOKEN: not passed on" in caplog.text


def test_every_rank_has_a_log_of_its_own_that_signals_do_not_end(tmp_path):
    """What is written outside Python, too; standard output and error stay apart."""
    code = """
import os, signal, sys
from mm_moslora.launch.child_processes import keep_rank_log
keep_rank_log(os.environ)
children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
for child in children:
    os.kill(int(child), signal.SIGTERM)
print(len(children), flush=True)
os.system("echo outside")
sys.stderr.write("failed\\n")
"""
    environment = os.environ | {"RANK": "3", "MM_MOSLORA_LOG_DIR": str(tmp_path / "logs")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\noutside\n", "failed\n")
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name == "rank-00003.log"
    assert {"outside", "failed"} <= set(log.read_text().split())
    assert log.read_text().splitlines()[0].partition(": ")[2].startswith("rank 3 on ")
    keep_rank_log({})  # changes nothing


@pytest.fixture
def slurm_tools(monkeypatch, tmp_path):
    """Commands of SLURM that write down how they are called; `squeue` answers what a test writes."""
    for name, text in {
        "scontrol": 'echo "scontrol $*" >>"$CALLS"; [ "$1" = show ] && printf "node-7\nnode-8\n"; true',
        "srun": 'shift; exec "$@"', "scancel": 'echo "scancel $*" >>"$CALLS"',
        "squeue": 'case "$*" in *--steps*) cat "$CALLS.steps" ;; *) cat "$CALLS.state" ;; esac',
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    (tmp_path / "calls.state").write_text("RUNNING\n")
    (tmp_path / "calls.steps").write_text("12.batch batch\n")
    return tmp_path


def job_of(**environment: str) -> SlurmJob:
    basic = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[7-8]"}
    job = SlurmJob.current(basic | environment)
    assert job is not None
    return job


def test_a_slurm_job_goes_through_srun(slurm_tools):
    words = joined(Topology(nproc=8, job=job_of(SLURM_RESTART_COUNT="3", SLURM_CPUS_PER_TASK="64")))
    assert words.startswith(
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 "
        f"--job-name=mm-moslora-{os.getpid()} --cpus-per-task=64 "
    )
    assert "--nproc_per_node 8 --nnodes 2 --rdzv_backend c10d --rdzv_id 12-3-" in words
    assert " --rdzv_endpoint node-7:2" in words
    assert "--overlap" not in words
    assert SlurmJob.current({}) is None


def test_two_launches_in_a_slurm_job_do_not_meet(slurm_tools):
    first, second = (job_of().rendezvous() for _ in range(2))
    assert first[5] != second[5], "the same id of the rendezvous"


def test_the_step_has_one_task_on_each_node_whatever_the_job_has(slurm_tools):
    job = {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_NPROCS": "16"}
    words = job_of(**job, SLURM_CPUS_PER_TASK="4").srun()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=32"} <= {*words}
    kept = {"SLURM_JOB_ID": "12", "PATH": "/bin"}
    assert slurm_job.step_environment(job | kept) == kept


@pytest.mark.parametrize(
    "word", ["-N1", "-N", "--nodes=1", "-n2", "--ntasks", "--ntasks-per-node=2", "-wa", "--exclude=a"]
)
def test_options_of_srun_that_choose_nodes_or_tasks_are_refused(word, slurm_tools):
    with pytest.raises(ConfigError, match=f"--srun {word} changes the nodes or the tasks"):
        Topology(job=job_of(), srun=("--exact", word))


def test_a_launch_within_a_step_shares_its_cpus_and_several_tasks_may_not_launch(slurm_tools):
    assert "--overlap" in job_of(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1").srun()
    assert "--overlap" not in job_of(SLURM_STEP_ID=str(0xFFFF_FFFA)).srun(), "the shell of salloc"
    with pytest.raises(ConfigError, match="a step of 2 tasks, and each would start all ranks"):
        job_of(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2").srun()


LONE = [
    {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
    {"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}, {"MV2_COMM_WORLD_SIZE": "2"},
    {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
]  # fmt: skip


@pytest.mark.parametrize("given", LONE)
def test_one_of_several_processes_without_a_rank_does_not_train_alone(given, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):  # which a training in this process may have left
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match="would train alone"):
        distributed.check_launcher()
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.check_launcher()


@pytest.mark.parametrize("given", [{"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {"OMPI_COMM_WORLD_SIZE": "1"}])
def test_a_batch_script_and_a_single_task_train(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    distributed.check_launcher()


def test_nodes_of_a_slurm_job_count_their_own_gpus(slurm_tools, monkeypatch):
    """SLURM_GPUS_ON_NODE is that of the first node."""
    assert "--nproc_per_node gpu --nnodes 2 " in joined(Topology(job=job_of(SLURM_GPUS_ON_NODE="4")))
    monkeypatch.setattr(topology, "accelerators", lambda: 0)
    assert "--nproc_per_node 1 --nnodes 2 " in joined(Topology(job=job_of()))


def test_a_slurm_step_is_told_by_its_name_and_srun_before_there_is_one(slurm_tools):
    """`srun` answers SIGTERM by killing its step. SLURM tells a cancelled step."""
    job, calls = job_of(), slurm_tools / "calls"
    with subprocess.Popen(["sleep", "30"]) as child:
        (slurm_tools / "calls.state").write_text("COMPLETING\n")
        job.terminate_step(child.pid)
        (slurm_tools / "calls.state").write_text("RUNNING\n")
        (slurm_tools / "calls.steps").write_text(f"12.batch batch\n12.3 other work\n12.4 {job.step_name}\n")
        job.terminate_step(child.pid)
        assert calls.read_text() == "scancel --signal=TERM 12.4\n"
        assert child.poll() is None
        (slurm_tools / "calls.steps").write_text("12.batch batch\n")
        job.terminate_step(child.pid)
        assert child.wait(timeout=120) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("signals", "restarts", "saves", "code", "requeued"),
    [
        ({signal.SIGUSR1}, 0, False, 75, True),
        ({signal.SIGUSR1}, 1, True, 75, True),
        ({signal.SIGUSR1}, 1, False, 1, False),
        ({signal.SIGTERM}, 0, True, 75, False),
        ({signal.SIGTERM, signal.SIGUSR1}, 2, True, 75, True),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_at_its_time_limit_while_it_gets_on(
    signals, restarts, saves, code, requeued, slurm_tools
):
    run = slurm_tools / "run"
    (run / "checkpoint-000004").mkdir(parents=True)
    requeue = Requeue(job_of(SLURM_RESTART_COUNT=str(restarts)))
    requeue.watch(run)
    if saves:
        (run / "checkpoint-000008").mkdir()
    assert requeue.stopped(signals, 75) == code
    calls = slurm_tools / "calls"
    assert (calls.exists() and calls.read_text() == "scontrol requeue 12\n") == requeued


def test_a_slurm_job_whose_recipe_was_not_read_yet_is_put_back_once(slurm_tools):
    assert Requeue(job_of()).stopped({signal.SIGUSR1}, 75) == 75
    assert Requeue(job_of(SLURM_RESTART_COUNT="1")).stopped({signal.SIGUSR1}, 75) == 1


def busy_at_first(folder, tool, times):
    """Let a command of SLURM fail so many times before it does its work."""
    command = folder / tool
    kept = command.rename(folder / f"real-{tool}")
    command.write_text(
        f'#!/bin/sh\nif [ "$(cat "{folder}/left" 2>/dev/null || echo {times})" -gt 0 ]; then\n'
        f'  echo $(($(cat "{folder}/left" 2>/dev/null || echo {times}) - 1)) >"{folder}/left"\n'
        f'  echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1\nfi\nexec "{kept}" "$@"\n'
    )
    command.chmod(0o755)


@pytest.mark.parametrize("tool", ["squeue", "scancel"])
@pytest.mark.parametrize("times", [2, 100])
def test_a_slurm_controller_that_does_not_answer_costs_no_step_its_checkpoint(
    tool, times, slurm_tools, monkeypatch, caplog
):
    """Without an answer nobody knows whether the step runs, and `srun` would kill it."""
    monkeypatch.setattr(slurm_job, "_PAUSE", 0.01)
    job = job_of()
    (slurm_tools / "calls.steps").write_text(f"12.4 {job.step_name}\n")
    busy_at_first(slurm_tools, tool, times)
    with subprocess.Popen(["sleep", "30"]) as child:
        job.terminate_step(child.pid)
        assert child.poll() is None
        child.kill()
    calls = slurm_tools / "calls"
    assert calls.exists() == (times == 2)
    assert ("the step of job 12 was not asked to save" in caplog.text) == (times == 100)
    assert times == 100 or calls.read_text() == "scancel --signal=TERM 12.4\n"


@pytest.mark.parametrize(("times", "code"), [(2, 75), (100, 1)])
def test_a_slurm_job_that_is_not_taken_back_says_so(times, code, slurm_tools, monkeypatch, caplog):
    monkeypatch.setattr(slurm_job, "_PAUSE", 0.01)
    requeue = Requeue(job_of())
    busy_at_first(slurm_tools, "scontrol", times)
    assert requeue.stopped({signal.SIGUSR1}, 75) == code
    assert (slurm_tools / "calls").exists() == (code == 75)
    assert ("did not put job 12 back" in caplog.text) == (code == 1)


def test_an_element_of_an_array_is_not_the_array(slurm_tools):
    """SLURM's commands take the number of one of its elements for all of them. sbatch passes on that of another job."""
    job = job_of(SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3")
    assert Requeue(job).stopped({signal.SIGUSR1}, 75) == 75
    assert (slurm_tools / "calls").read_text() == "scontrol requeue 12_3\n"
    assert job_of(SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="3").name == "12"


@pytest.mark.parametrize(("title", "kept"), [("12.batch", False), ("12.0", True), ("9.batch", True)])
def test_a_batch_script_forgets_the_step_of_the_shell_that_submitted_it(title, kept):
    code = "from mm_moslora.cli import run; import os; run(['--version']); print('SLURM_STEP_NUM_TASKS' in os.environ)"
    inner = f'SLURM_TASK_PID=$$ exec "{sys.executable}" -c "{code}"'
    outer = ["bash", "-c", f"""exec -a "slurmstepd: [{title}]" bash -c 'bash -c "$CODE"; true'"""]
    step = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "CODE": inner}
    done = subprocess.run(outer, env=os.environ | step, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(kept), done.stderr


def test_requeue_outside_slurm_is_refused(monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert cli.run(["launch", "--requeue", "quickstart_tune"]) == 1
    assert "--requeue is for SLURM jobs, but SLURM_JOB_ID or srun is missing here" in capsys.readouterr().err


def test_diffusion_recipes_are_launched_too(capsys):
    assert cli.run(["launch", "--dry-run", "sdxl_subject", "--train.steps", "9"]) == 0
    shown = capsys.readouterr()
    assert "steps: 9" in shown.out
    assert "-m mm_moslora train sdxl_subject --train.steps 9" in shown.err
    assert "nproc_per_node" not in shown.err
    assert cli.run(["launch", "--nproc", "2", "sdxl_subject"]) == 1
    assert "Diffusion models train in one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NPROC", "many", "from 1"), ("NPROC", "0", "from 1"), ("NPROC", "9" * 5000, "from 1"),
        ("MASTER_PORT", "abc", "from 1 to 65535"), ("MASTER_PORT", "70000", "from 1 to 65535"),
        ("RANK", "-1", "from 0"), ("WORLD_SIZE", "two", "from 1"), ("SLURM_JOB_ID", "12a", "from 0"),
        ("SLURM_JOB_NUM_NODES", "٣", "from 1"), ("SLURM_RESTART_COUNT", "1.5", "from 0"),
    ],
)  # fmt: skip
def test_a_number_of_the_environment_that_is_none_is_one_clear_error(
    name, value, expected, slurm_tools, monkeypatch, capsys
):
    if name.startswith("SLURM"):
        monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv(name, value)
    assert cli.run(["launch", "--deepspeed", "--dry-run", "quickstart_tune"]) == 1
    said = capsys.readouterr().err
    assert f"error: The environment variable {name} is '{value[:80]}', expected a whole number {expected}" in said


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT"])
def test_a_rank_refuses_the_same_numbers(name, monkeypatch):
    for left in (
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
    ):  # DeepSpeed sets them in the process of an earlier test
        monkeypatch.delenv(left, raising=False)
    for given, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "node-1", "MASTER_PORT": "29400"}.items():
        monkeypatch.setenv(given, value)
    monkeypatch.setenv(name, "many")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=f"environment variable {name} is 'many', expected a whole number"):
        distributed.ranks_of_host(), distributed.local_rank(), distributed.join()
    monkeypatch.setenv(name, "")
    assert (distributed.ranks_of_host(), distributed.local_rank()) == (1 if name == "WORLD_SIZE" else 2, 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nnodes": 2}, "no --rdzv HOST:PORT"),
        ({"hostfile": "missing"}, "does not exist"),
        ({"hostfile": "one", "nnodes": 2, "rdzv": "a:1"}, "two ways"),
        ({"hostfile": "one", "through": ("x",)}, "--through needs torchrun"),
        ({"deepspeed": True, "max_restarts": 1}, "--max-restarts needs torchrun"),
        ({"local_addr": "10.0.0.1"}, "--local-addr 10.0.0.1 is for several hosts"),
        ({"srun": ("--container-image=x",)}, "--srun is for SLURM jobs"),
        ({"hostfile": "odd"}, "holds 'worker-2', expected lines such as 'worker-1 slots=8'"),
        ({"hostfile": "empty"}, "names no host"),
        ({"nproc": 0}, "--nproc is 0, expected 1 or more"),
        ({"nnodes": 0}, "--nnodes is 0, expected 1 or more"),
        ({"max_restarts": -1}, "--max-restarts is -1, expected 0 or more"),
        ({"nnodes": 2, "rdzv": "node-1"}, "expected HOST:PORT"),
        ({"nnodes": 2, "rdzv": "node-1:99999"}, "expected HOST:PORT"),
        ({"rdzv": "node-1:29400"}, "--nnodes is 1"),
    ],
)
def test_wrong_places_are_explained(wrong, said, tmp_path):
    (tmp_path / "odd").write_text("# two\nworker-1 slots=8  # the first\n\nworker-2\n")
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "one").write_text("worker-1 slots=8\n")
    if "hostfile" in wrong:
        wrong = wrong | {"hostfile": tmp_path / wrong["hostfile"]}
    with pytest.raises(ConfigError, match=said):
        Topology(**wrong)


@pytest.mark.parametrize(("script", "code"), [("raise SystemExit(3)", 3), ("", 0)])
def test_the_exit_code_is_the_launchers(script, code, monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "command", lambda *_, **__: [sys.executable, "-c", script])
    assert launcher.launch(Topology(), [], run_folder=tmp_path) == code
    assert launcher.launch(Topology(), [], run_folder=tmp_path, dry_run=True) == 0


@pytest.mark.parametrize(("script", "told"), [("true", True), ("echo {} > state.json", False)])
def test_ranks_that_do_not_meet_are_told_once(script, told, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "SILENT_SECONDS", 3)
    monkeypatch.setattr(launcher, "command", lambda *_, **__: ["sh", "-c", f"{script}; sleep 4"])
    assert launcher.launch(Topology(), [], run_folder=tmp_path) == 0
    assert caplog.text.count("The ranks have not met within 3 s") == told


def test_ctrl_c_in_a_terminal_reaches_the_ranks_once(tmp_path):
    """A terminal sends it to the whole process group, and torchrun leaves its ranks when it hears a second one."""
    ranks = (
        "import pathlib, signal, time\n"
        f"heard = pathlib.Path({str(tmp_path / 'heard')!r})\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda number, _: heard.open('a').write(f'{number}\\n'))\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "end = time.monotonic() + 60\n"
        "while not heard.exists() and time.monotonic() < end: time.sleep(0.02)\n"
        "time.sleep(0.5)\n"
    )
    code = (
        "import pathlib, signal, sys; from mm_moslora.launch import launcher as launch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"launch.command = lambda *_, **__: [sys.executable, '-c', {ranks!r}]\n"
        f"launch.launch(launch.Topology(), [], run_folder=pathlib.Path({str(tmp_path)!r}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        wait_until((tmp_path / "started").exists, process=process)
        os.killpg(process.pid, signal.SIGINT)
    assert (tmp_path / "heard").read_text().split() == [str(int(signal.SIGTERM))]


STARTS = {
    "launch": "launch.command = lambda *_, **__: {words}\nlaunch.launch(launch.Topology(), [], run_folder=folder)\n",
    "a run of compare on several devices": (
        "from types import SimpleNamespace; from mm_moslora.compare import comparison_cell as cell\n"
        "from mm_moslora.launch import child_processes; child_processes.python_words = lambda *_: {words}\n"
        "cell._train_on_several(SimpleNamespace(cards=2, run_folder=folder), None)\n"
    ),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_save_and_end_with_a_launcher_that_is_gone(number, start, tmp_path):
    ranks = (
        "import os, pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((folder / 'saved').touch(), sys.exit(0)))\n"
        "(folder / 'started.tmp').write_text(str(os.getpid()))\n"
        "(folder / 'started.tmp').rename(folder / 'started')\n"
        "time.sleep(120)\n"
    )
    code = (
        "import pathlib, sys; from mm_moslora.launch import launcher as launch\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n" + STARTS[start].format(words=f"[sys.executable, '-c', {ranks!r}]")
    )
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        wait_until((tmp_path / "started").exists, process=process)
        process.send_signal(number)
    wait_until((tmp_path / "saved").exists)
    pid = int((tmp_path / "started").read_text())
    wait_until(lambda: not psutil.pid_exists(pid))


def test_a_scheduler_that_repeats_itself_is_handed_on_once_and_the_third_ctrl_c_ends_all(monkeypatch, tmp_path):
    monkeypatch.setattr(child_processes, "ONE_REQUEST_SECONDS", 0.0)
    started, heard, rank = tmp_path / "started", tmp_path / "heard", tmp_path / "rank"
    torchrun = (
        "import pathlib, signal, subprocess, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(heard)!r}).open('a').write('told\\n'))\n"
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        f"pathlib.Path({str(rank)!r}).write_text(str(rank.pid))\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        "while True: time.sleep(0.05)\n"
    )

    counted, count = [], child_processes.RequestCounter.count

    def counts(self, number: int) -> int:
        counted.append(number)
        return count(self, number)

    def tell() -> None:
        numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGINT]
        wait_until(started.exists)
        for index, number in enumerate(numbers):
            signal.pthread_kill(threading.main_thread().ident, number)
            # Two signals of one number before the first is heard are one.
            wait_until(lambda wanted=numbers[: index + 1]: counted == wanted and heard.exists())

    monkeypatch.setattr(child_processes.RequestCounter, "count", counts)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(launcher, "command", lambda *_, **__: [sys.executable, "-c", torchrun])
    thread = threading.Thread(target=tell)
    thread.start()
    try:
        assert launcher.launch(Topology(), [], run_folder=tmp_path) == 75
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert heard.read_text().split() == ["told"]
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(rank.read_text())).wait(20)


def test_ranks_record_what_they_wait_for_without_a_warning():
    code = (
        "import os, torch\n"
        "from mm_moslora.utils import distributed\n"
        "distributed.join()\n"
        "torch.distributed.all_reduce(torch.ones(1))\n"
        "print(os.environ['TORCH_NCCL_DUMP_ON_TIMEOUT'], torch._C._distributed_c10d._dump_fr_trace_json())\n"
    )
    ours = {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ")
    assert "gloo:all_reduce" in done.stdout
    assert "deprecated" not in done.stderr


@pytest.mark.parametrize(("given", "expected"), [({}, "2000"), ({"TORCH_FR_BUFFER_SIZE": "7"}, None)])
def test_an_older_torch_is_told_to_record(given, expected, monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.9.1")
    with mock.patch.dict(os.environ, given, clear=True):
        distributed.record_flight()
        assert os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE") == expected


@pytest.mark.parametrize(
    ("leave", "state", "code"),
    [
        ("(mark.touch(), sys.exit(1))", "stopped", 75),
        ("sys.exit(1)", "running", 75),
        ("sys.exit(0)", "running", 75),
        ("sys.exit(0)", "finished", 0),
    ],
)
def test_a_signal_is_handed_on_and_a_stopped_run_asks_to_be_started_again(leave, state, code, monkeypatch, tmp_path):
    """Also one with ranks that had not begun, or could not save; DeepSpeed's runner takes a stop for a success."""
    (tmp_path / "state.json").write_text(f'{{"state": "{state}"}}')
    (tmp_path / "run.lock").touch()
    script = (
        "import pathlib, signal, sys, time\n"
        f"mark = pathlib.Path({str(tmp_path / 'STOPPED')!r})\n"
        f"signal.signal(signal.SIGTERM, lambda *_: {leave})\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setattr(launcher, "command", lambda *_, **__: [sys.executable, "-c", script])

    def interrupt() -> None:
        wait_until((tmp_path / "started").exists)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launcher.launch(Topology(), [], run_folder=tmp_path) == code
    thread.join()


def test_a_signal_before_the_launcher_is_started_asks_for_another_start(monkeypatch, capsys):
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
    monkeypatch.setattr("mm_moslora.cli.launch_verbs.refuse_early", lambda *_: signal.raise_signal(signal.SIGUSR1))
    assert cli.run(["launch", "quickstart_tune"]) == 75
    assert "before anything was started" in capsys.readouterr().err


def test_a_run_that_was_stopped_before_it_took_its_folder_can_be_started(monkeypatch, tmp_path, capsys):
    def stopped(recipe, *, stop, **_):
        stop.received = signal.SIGTERM
        raise Stopped

    monkeypatch.setattr("mm_moslora.cli.cli_app._train", stopped)
    run = tmp_path / "run"
    assert cli.run(["train", "quickstart_tune", "--train.output", str(run)]) == 75
    assert (run / "STOPPED").read_text() == launcher.stopped_text(signal.SIGTERM) == capsys.readouterr().out
    assert "Ctrl-C" in launcher.stopped_text(signal.SIGTERM), "a launcher's SIGTERM may have been one"
    with exclusive(run):  # what the same command does first
        pass


def test_a_file_of_the_user_that_is_called_stopped_is_neither_deleted_nor_written(tmp_path):
    (tmp_path / "STOPPED").write_text("the clock, at 3:15")
    launcher.leave_mark(tmp_path, signal.SIGTERM)
    with pytest.raises(ConfigError, match="already holds STOPPED"):
        launcher.launch(Topology(), ["r.yaml"], run_folder=tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"STOPPED": "the clock, at 3:15"}


def test_a_signal_that_comes_while_the_launcher_starts_is_handed_on(monkeypatch):
    lost = []
    before = signal.signal(signal.SIGUSR1, lambda *_: lost.append(1))
    here = threading.main_thread().ident
    just_before(
        monkeypatch, subprocess, "Popen", lambda: signal.pthread_kill(here, signal.SIGUSR1), when=lambda *_: True
    )
    try:
        ended = run_and_hand_on([sys.executable, "-c", "import time; time.sleep(20)"], signals=[signal.SIGUSR1])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (ended.code, ended.signals) == (-signal.SIGTERM, {signal.SIGUSR1})
    assert not lost


def test_deepspeeds_runner_is_told_itself_until_it_has_started_its_launcher_here():
    """Nothing yet, the program that reaches other hosts, the launcher, which keeps the runner waiting."""

    def runner(child: str) -> subprocess.Popen[str]:
        code = f"import subprocess, sys; child = {child}; print(1, flush=True); sys.exit(child.wait() % 100)"
        process = subprocess.Popen([sys.executable, "-c", code], process_group=0, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "1\n"
        return process

    module = "subprocess.Popen([sys.executable, '-u', '-m', 'deepspeed.launcher.launch', '--help'], stdin=-1)"
    cases = {
        "__import__('threading').Event()": -signal.SIGTERM,
        "subprocess.Popen(['sleep', '60'])": -signal.SIGTERM,
        module: -signal.SIGTERM % 100,
    }
    for child, code in cases.items():
        with runner(child) as process:
            children = psutil.Process(process.pid).children  # the system writes down a moment later what has begun
            wait_until(lambda children=children: all(other.cmdline() for other in children()))
            launcher.end_deepspeed(process.pid)
            assert process.wait(timeout=120) == code, child
    launcher.end_deepspeed(process.pid)  # gone
