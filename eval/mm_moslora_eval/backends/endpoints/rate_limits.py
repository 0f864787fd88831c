"""Limits of requests and tokens in a minute, and what tokens cost."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

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
