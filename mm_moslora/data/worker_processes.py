"""Maps a function over items in forked processes, in order and with bounded memory; with one process, in this one."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mm_moslora.launch.child_processes import fork_context, forked_pool
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.hardware import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 3
"""Items per process that are submitted before the first result is taken."""
_work: Callable[[Any], Any] | None = None  # forked processes inherit it, so it need not be picklable


def usable_processes() -> int:
    """Processors that this process may use, 16 at most."""
    return min(16, usable_cores())


def in_processes(work: Callable[[Item], Result], items: Iterable[Item], *, processes: int) -> Iterator[Result]:
    """`work(item)` for every item, in order; items and results are picklable. With one process this one does it."""
    context = fork_context()
    if processes <= 1 or context is None:
        yield from map(work, items)
        return
    global _work
    _work = work
    waiting: deque[Future[Result]] = deque()
    with forked_pool(processes, context, _end_with) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) >= _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "A process that prepared data died, most likely for want of memory. Use fewer of them."
            ) from error
        finally:
            for future in waiting:
                future.cancel()
            _work = None


def _end_with(parent: int) -> None:
    """End this process when its parent ends, even by a kill; otherwise it would wait for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _call(item: Any) -> Any:
    assert _work is not None
    return _work(item)
