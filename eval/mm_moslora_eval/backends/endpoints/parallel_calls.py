"""Calls of a service in threads, which stop where it is down; limits of requests and tokens a minute, and prices."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from mm_moslora.utils.errors import EvalError

_MINUTE = 60.0


class RateLimit:
    """Spreads the requests of all threads, so that no minute has more than the limits.

    A request takes its share of the minute when it starts, by the tokens that are expected; what it used more or less
    is settled when its reply is there.
    """

    def __init__(
        self, *, requests: float | None = None, tokens: float | None = None,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("requests", requests), ("tokens", tokens)):
            if value is not None and not 0 < value < math.inf:
                raise EvalError(f"--{name}-per-minute is {value}, expected a number above 0.")
        self._requests, self._tokens, self._clock, self._sleep = requests, tokens, clock, sleep
        self._free, self._lock = 0.0, threading.Lock()

    def wait(self, tokens: int) -> None:
        """Wait until a request of so many tokens may start."""
        with self._lock:
            now = self._clock()
            starts = max(now, self._free)
            self._free = starts + max(_MINUTE / self._requests if self._requests else 0.0, self._share(tokens))
        if starts > now:
            (self._sleep or time.sleep)(starts - now)

    def settle(self, *, expected: int, used: int) -> None:
        """Correct the tokens of a request that has ended."""
        with self._lock:
            self._free += max(0.0, self._share(used) - self._share(expected))

    def pause(self, seconds: float) -> None:
        """Start no request for so long, since the server said so to one of them."""
        with self._lock:
            self._free = max(self._free, self._clock() + seconds)

    def _share(self, tokens: int) -> float:
        return tokens * _MINUTE / self._tokens if self._tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of a million tokens, in any currency."""

    prompt: float
    completion: float

    @classmethod
    def parse(cls, text: str) -> Prices:
        """Read `IN/OUT`, such as 3/15."""
        try:
            prompt, completion = (float(part) for part in text.split("/"))
        except ValueError:
            prompt = completion = math.nan
        if not (0 <= prompt < math.inf and 0 <= completion < math.inf):
            raise EvalError(f"{text!r} is no price; expected IN/OUT per million tokens, such as 3/15.")
        return cls(prompt=prompt, completion=completion)

    def cost(self, *, prompt: int, completion: int) -> float:
        """What so many tokens cost."""
        return (prompt * self.prompt + completion * self.completion) / 1e6

    def to_dict(self) -> dict[str, float]:
        """The prices as plain data."""
        return asdict(self)


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
