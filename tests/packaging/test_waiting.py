"""Tests wait for what others do, not for a time, and measure work, not seconds: machines may be busy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
CLOCKS = {"monotonic", "perf_counter", "time"}
SLEEPS = {
    "cli/test_cli.py:test_a_second_ctrl_c_while_the_interpreter_ends_is_quiet": "a slow end, which the signal cuts",
    "cli/test_cli.py:test_ctrl_c_while_the_command_line_is_imported_leaves_no_traceback": "the same of an import",
    "data/sources/test_record_sources.py:do_GET": "a server that sends byte after byte",
    "data/test_token_cache.py:work": "a process that has much to do",
    "distributed/faults.py:lost_in_thought": "a rank that hangs",
    "distributed/faults.py:slowly": "a rank, or a tracker, that takes its time",
    "distributed/faults.py:wait": "a rank that is late",
    "distributed/test_faults.py:test_a_rank_that_is_stopped_is_named_and_says_so_when_it_is_woken": "the standstill",
    "eval/eval_fake.py:_answer": "a model that takes its time",
    "eval/run/test_task_runner.py:test_kill_9_at_random_points": "the random points",
    "launch/odd_jobs.py:main": "a job that stays until it is told to end",
    "launch/test_launcher.py:test_a_scheduler_that_repeats_itself_is_handed_on_once_and_the_third_ctrl_c_ends_all": (
        "ranks, until they are killed"
    ),
    "launch/test_launcher.py:test_a_signal_is_handed_on_and_a_stopped_run_asks_to_be_started_again": "a stopped run",
    "launch/test_launcher.py:test_a_signal_that_comes_while_the_launcher_starts_is_handed_on": "what the signal ends",
    "launch/test_launcher.py:test_ctrl_c_in_a_terminal_reaches_the_ranks_once": "time for a second signal",
    "packaging/test_preloaded.py:_started": "a process, until a signal ends it",
    "packaging/test_preloaded.py:test_a_signal_that_the_command_ignores_reaches_a_process_that_handles_it": "the same",
    "packaging/test_waiting.py:test_the_search_finds_them": "examples of this search",
    "quickstart/test_user_data.py:slowly": "makes the moment wider in which another call may come",
    "scripts/test_bench_parent.py:<module>": "a child, until its parent is gone",
    "serve/test_serve_load.py:all_at_once": "between two looks of an engine",
    "serve/test_serve_load.py:make": "an engine that takes its time",
    "serve/test_serve_load.py:test_a_stop_signal_lets_answers_end": "an engine that takes its time",
    "serve/test_web_guard.py:slow_server": "an engine that takes its time",
    "support/preloaded.py:slowly": "a step that takes its time",
    "support/waiting.py:stays": "the one that waits",
    "support/waiting.py:wait_until": "the one that waits",
    "training/test_stop_signals.py:load": "loading, which the signal interrupts",
    "training/test_stop_signals.py:test_what_is_forked_while_a_run_loads_ends_quietly_and_the_run_goes_on": "a pool",
    "training/test_training_loop.py:test_two_runs_in_one_folder_are_refused": "the other run, until it is killed",
    "training/test_watchdog.py:<module>": "ranks that are in a collective, until they are killed",
    "training/test_watchdog.py:test_a_torchrun_that_waits_for_a_lost_host_is_ended": "torchrun, until it is killed",
}
"""Functions that sleep or hold a script that does, with what their sleep stands for."""
LIMITS = {
    "launch/test_ray_engine.py:test_an_address_without_a_cluster_is_one_line": "Ray itself would try for minutes",
    "serve/test_serve_load.py:test_trickling_headers_and_bodies_are_cut": "the limit by itself is ten seconds",
    "launch/odd_jobs.py:main": "a job that stays",
    "support/waiting.py:stays": "the time itself",
}
"""Functions that compare clocks and fail when too much time has passed, with what cannot be counted instead."""


def calls(node: ast.AST, names: set[str]) -> bool:
    return (
        isinstance(node, ast.Call)
        and (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")) in names
    )


def functions(tree: ast.AST, inside: str = "<module>") -> Iterator[tuple[str, ast.AST]]:
    """Every node with the function it stands in."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield inside, node
        yield from functions(node, node.name if named else inside)


def is_limit(node: ast.AST) -> bool:
    """Whether it is a comparison of a clock that holds as long as little time has passed."""
    if not isinstance(node, ast.Compare) or not any(calls(part, CLOCKS) for part in ast.walk(node)):
        return False
    clock_is_left = any(calls(part, CLOCKS) for part in ast.walk(node.left))
    return isinstance(node.ops[0], ast.Lt | ast.LtE) == clock_is_left


def sleeps(source: str) -> set[str]:
    """Functions that sleep under any name, wait for an event that nobody can set, or hold a script that sleeps."""
    tree = ast.parse(source)
    names = {"sleep"}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(names=aliases):
                names |= {alias.asname for alias in aliases if alias.name == "sleep" and alias.asname}
            case ast.Assign(targets=targets, value=ast.Attribute(attr="sleep") | ast.Name(id="sleep")):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}

    def is_sleep(node: ast.AST) -> bool:
        match node:
            case ast.Call(func=ast.Attribute(value=event, attr="wait")) if calls(event, {"Event", "Condition"}):
                return True
            case ast.Constant(value=str(text)):
                return bool(re.search(r"\bsleep\((?!0\))", text))
        return calls(node, names) and not is_pause(node)

    return {name for name, node in functions(tree) if is_sleep(node)}


def is_pause(node: ast.Call) -> bool:
    """`asyncio.sleep(0)` lets others run."""
    return bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0


def limits(source: str) -> set[str]:
    asserted = (
        (name, part)
        for name, node in functions(ast.parse(source)) if isinstance(node, ast.Assert | ast.While | ast.If)
        for part in ast.walk(node.test)
    )  # fmt: skip
    return {name for name, part in asserted if is_limit(part)}


def test_tests_wait_for_conditions_and_set_no_time_limits_of_their_own() -> None:
    found: dict[str, set[str]] = {"sleeps": set(), "limits": set()}
    for path in TESTS.rglob("*.py"):
        place, source = path.relative_to(TESTS).as_posix(), path.read_text()
        found["sleeps"] |= {f"{place}:{name}" for name in sleeps(source)}
        found["limits"] |= {f"{place}:{name}" for name in limits(source)}
    assert found["sleeps"] - {*SLEEPS} == set(), "use wait_until of tests/support/waiting.py"
    assert found["limits"] - {*LIMITS} == set(), "count steps, requests or bytes, or use wait_until"
    assert {*SLEEPS} - found["sleeps"] == {*LIMITS} - found["limits"] == set(), "these are gone"


def test_the_search_finds_them() -> None:
    assert sleeps("def f():\n    time.sleep(1)\n    async def g(): await asyncio.sleep(0)") == {"f"}
    assert sleeps("from time import sleep\nsleep(x)") == {"<module>"}
    assert sleeps("from time import sleep as nap\ndef f(): nap(1)") == {"f"}
    assert sleeps("nap = time.sleep\ndef f(): nap(1)") == {"f"}
    assert sleeps("def f(): threading.Event().wait(1)\ndef g(): done.wait(1)") == {"f"}
    assert sleeps("def f(): return f'import time; time.sleep({x})', 'asyncio.sleep(0)'") == {"f"}
    assert limits("def f():\n    assert time.monotonic() - begun < 3") == {"f"}
    assert limits("def f():\n    while not g() and time.monotonic() < end: pass") == {"f"}
    assert limits("def f():\n    assert 3 > perf_counter() - begun") == {"f"}
    assert limits("def f():\n    assert monotonic() - begun > 3, 'as long at least'") == set()
