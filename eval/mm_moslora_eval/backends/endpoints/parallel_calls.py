"""Calls of a service in threads, which stop where it is down."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from mm_moslora.utils.errors import EvalError

_HOPELESS_ROW = 4
"""Nothing more is asked after this many failures without a success between them."""

_T = TypeVar("_T")


class ServerError(RuntimeError):
    """A server that is overloaded, broken or silent; the request itself may be sound."""


def in_parallel(
    call: Callable[[_T], Any], items: Sequence[_T], *, workers: int, fatal: type[Exception] = ServerError
) -> Iterator[tuple[int, Any]]:
    """Call a function on every item in threads; yields (number, result) as they finish, then raises the last failure.

    After a failure the other items are still processed, unless several fail without a success between them. An
    `EvalError` stops everything at once. The threads are daemons, so that an interrupted program does not wait for a
    server that hangs.
    """
    left = iter(enumerate(items))
    taking, stopped = threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    row = 0

    def work() -> None:
        nonlocal row
        while True:
            with taking:
                taken = None if stopped.is_set() else next(left, None)
            if taken is None:
                return
            result: Any = None
            failure: BaseException | None = None
            try:
                result = call(taken[1])
            except BaseException as error:  # handed to the caller
                failure = error
            with taking:  # here, not where results are read: whoever reads may take its time
                row = 0 if failure is None else row + isinstance(failure, fatal)
                if failure is not None and row == _HOPELESS_ROW and not isinstance(failure, EvalError):
                    failure = _hopeless(failure)
                if isinstance(failure, EvalError):
                    stopped.set()
                done.put((taken[0], result, failure))

    for _ in range(min(max(1, workers), len(items))):
        threading.Thread(target=work, name="endpoint", daemon=True).start()
    last: Exception | None = None
    try:
        for _ in items:
            number, result, error = done.get()
            if error is None:
                yield number, result
            elif isinstance(error, EvalError) or not isinstance(error, Exception):
                raise error
            else:
                last = error
    finally:
        stopped.set()
    if last is not None:
        raise last


def _hopeless(last: BaseException) -> EvalError:
    """What a row of failures ends with."""
    error = EvalError(
        f"{_HOPELESS_ROW} requests in a row failed, so nothing more is asked. The last one: {last}. What was answered "
        "is kept: mend the server (or change --timeout and --attempts), then run this again."
    )
    error.__cause__ = last
    return error
