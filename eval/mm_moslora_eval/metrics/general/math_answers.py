"""Mathematical answers, compared by `math-verify` in a process of its own with a time limit.

A formula can take for ever, or all memory: then the process is ended, and the next answer gets a new one.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Sequence
from contextlib import suppress

from mm_moslora.launch.child_processes import PIPE, Child, child_environment, python_words, start
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.package_requirements import install_extra, is_installed
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_object

SECONDS = 10.0
"""Time for one answer."""
FIRST_SECONDS = 120.0
"""Time for the first answer of a process, which imports sympy."""
MOST_CHARACTERS = 20_000
"""Characters of an answer that are read, from its end, where the result stands."""
_MOST_REPLY = 2**20


class MathProcess:
    """A process that compares answers one after the other; safe in threads."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._lock = threading.Lock()

    def equal(self, answer: str, references: Sequence[str], *, seconds: float = SECONDS) -> bool:
        """Whether an answer equals any of the references.

        Raises:
            TimeoutError: it takes longer than the time limit.
            RuntimeError: the process ended, such as for lack of memory, or math-verify failed.
        """
        line = json.dumps({"answer": answer[-MOST_CHARACTERS:], "references": [*references]}) + "\n"
        with self._lock:
            fresh = self._child is None or self._child.poll() is not None
            child = self._started() if fresh else self._child
            assert child is not None
            assert child.stdin is not None
            try:
                child.stdin.write(line.encode())
                child.stdin.flush()
                reply = self._reply(child, FIRST_SECONDS if fresh else seconds)
            except BaseException:
                self._end()
                raise
        if "error" in reply:
            raise RuntimeError(f"math-verify: {reply['error']}")
        return bool(reply.get("equal"))

    def _started(self) -> Child:
        if not is_installed("math_verify"):
            raise EvalError(f"Mathematics is compared by math-verify: {install_extra('math')}.")
        words = python_words("-m", "mm_moslora_eval.metrics.general.math_process")
        self._child = start(words, stdin=PIPE, stdout=PIPE, env=child_environment({"OMP_NUM_THREADS": "1"}))
        return self._child

    @staticmethod
    def _reply(child: Child, seconds: float) -> dict[str, object]:
        assert child.stdout is not None
        data, place = b"", child.stdout.fileno()
        while not data.endswith(b"\n"):
            if not select.select([place], [], [], seconds)[0]:
                raise TimeoutError(f"the comparison took more than {seconds:g} seconds")
            more = os.read(place, _MOST_REPLY)
            if not more:
                raise RuntimeError("the process that compares formulas ended; it may need more memory than it has")
            data += more
        try:
            return parse_object(data)
        except StrictJsonError as error:
            raise RuntimeError(f"the reply of the process that compares formulas {error}") from error

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()


PROCESS = MathProcess()
"""The one of this process; its own ends with it, at the end of its input."""
