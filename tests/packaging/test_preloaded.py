"""Processes of a Python that has imported everything are like those of any other."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from preloaded import Preloaded
from waiting import wait_until


def test_arguments_environment_folder_files_and_exit_code_are_its_own(python: Preloaded, tmp_path: Path) -> None:
    code = (
        "import os, sys; print(sys.argv, os.getcwd(), os.environ['WORD'], sys.path[:2], sys.stdin.read());"
        "sys.exit('no')"
    )
    environment = {"WORD": "x", "PYTHONPATH": "/first"}
    command = [python.ours, "-c", code, "a", "b c"]
    done = subprocess.run(command, input="in", capture_output=True, text=True, cwd=tmp_path, env=environment)
    said = f"['-c', 'a', 'b c'] {tmp_path} x ['', '/first'] in\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, said, "no\n")
    (tmp_path / "script.py").write_text("import sys\nif __name__ == '__main__': print(sys.argv, sys.path[0])\n1 / 0")
    done = subprocess.run([python.ours, tmp_path / "script.py", "a"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, f"['{tmp_path / 'script.py'}', 'a'] {tmp_path}\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    done = subprocess.run([python.ours, "-u", "-m", "mm_moslora", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_has_imported_us_and_one_has_not_and_what_they_start_is_as_fast(python: Preloaded) -> None:
    code = "import sys; print(*(m in sys.modules for m in ('torch', 'peft', 'mm_moslora', 'deepspeed')));"
    for command, said in ((python.ours, "True True True True\n"), (python.stock, "True True False False\n")):
        assert subprocess.run([command, "-c", code], capture_output=True, text=True).stdout == said
        again = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
        assert subprocess.run([command, "-c", again], capture_output=True, text=True).stdout == said


def test_files_that_are_open_are_handed_on(python: Preloaded, tmp_path: Path) -> None:
    with (tmp_path / "a").open("w") as a, (tmp_path / "b").open("w") as b:
        code = f"import os; os.write({a.fileno()}, b'a'); os.write({b.fileno()}, b'b')"
        subprocess.run([python.stock, "-c", code], pass_fds=[a.fileno(), b.fileno()], check=True)
        assert subprocess.run([python.stock, "-c", code], pass_fds=[a.fileno()], stderr=subprocess.DEVNULL).returncode
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("aa", "b")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing_starts_through_it(method: str, python: Preloaded) -> None:
    code = (
        "import multiprocessing, os, sys; context = multiprocessing.get_context(sys.argv[1]);"
        'found = context.Pool(1).apply(eval, [\'__import__("sys").modules.keys() >= {"torch", "mm_moslora"}\']);'
        "print(found)"
    )
    done = subprocess.run([python.ours, "-c", code, method], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr


def _started(python: Preloaded, code: str) -> tuple[subprocess.Popen[str], int]:
    code = f"import os, signal, sys, time; {code}; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([python.ours, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_signals_reach_it_and_its_end_by_one_is_told(number: signal.Signals, python: Preloaded) -> None:
    process, pid = _started(python, "pass")
    os.kill(pid, number)
    assert process.wait(60) == -number
    if number != signal.SIGKILL:
        process, _ = _started(python, f"signal.signal({number:d}, lambda *_: sys.exit(7))")
        process.send_signal(number)
        assert process.wait(60) == 7
        process, _ = _started(python, "pass")
        process.send_signal(number)
        assert process.wait(60) == -number


def test_a_signal_that_is_blocked_waits_until_the_process_asks_for_it(python: Preloaded) -> None:
    """As under `env --block-signal`."""
    code = (
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7)); print('there', flush=True);"
        "found = [signal.sigtimedwait([signal.SIGTERM], 0.01) for _ in iter(signal.sigpending, {signal.SIGUSR1})];"
        "print('waits', flush=True); signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])"
    )
    process = subprocess.Popen(
        ["env", "--block-signal=USR1", python.ours, "-c", f"import signal, sys; {code}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60)[0] == "waits\n"
    assert process.returncode == 7


def test_a_signal_that_the_command_ignores_reaches_a_process_that_handles_it(python: Preloaded) -> None:
    """As Ctrl-C of what a shell starts with `&`."""
    code = "import signal, sys, time; signal.signal(2, lambda *_: sys.exit(7)); print(flush=True); time.sleep(60)"
    words = ["sh", "-c", 'trap "" INT; exec "$0" -c "$1"', python.ours, code]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 7
    process.stdout.close()


def test_it_ends_when_the_command_is_killed(python: Preloaded) -> None:
    process, pid = _started(python, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
