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

    Args:
        call: takes an item, in a thread.
        items: all items.
        workers: number of threads.
        fatal: failures that may concern all items.

    Raises:
        EvalError: too many such failures in a row.
    """
    left = iter(enumerate(items))
    taking, stopped = threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            with taking:
                taken = None if stopped.is_set() else next(left, None)
            if taken is None:
                return
            try:
                done.put((taken[0], call(taken[1]), None))
            except BaseException as error:  # handed to the caller
                if isinstance(error, EvalError):
                    stopped.set()
                done.put((taken[0], None, error))

    for _ in range(min(max(1, workers), len(items))):
        threading.Thread(target=work, name="endpoint", daemon=True).start()
    failure: Exception | None = None
    row = 0
    try:
        for _ in items:
            number, result, error = done.get()
            if error is None:
                row = 0
                yield number, result
            elif isinstance(error, EvalError) or not isinstance(error, Exception):
                raise error
            else:
                failure, row = error, row + isinstance(error, fatal)
                if row == _HOPELESS_ROW:
                    raise EvalError(
                        f"{row} requests in a row failed, so nothing more is asked. The last one: {error}. What was "
                        "answered is kept: mend the server (or change --timeout and --attempts), then run this again."
                    ) from error
    finally:
        stopped.set()
    if failure is not None:
        raise failure
