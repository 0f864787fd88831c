r"""The number that a LaTeX expression stands for: `\frac{1}{2}`, `2\sqrt{3}-\pi`, `6\frac{1}{4}`, `3:16`, `$30\%$`.

Only arithmetic is read, by a parser of its own: nothing is evaluated as code, and the size of exponents and factorials
is bounded. As in the reader that MATH-Vision uses (latex2sympy2), an expression may be followed by a period or a
closing bracket and any text, one with a variable or another sign has no value, and a number before a fraction
multiplies it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

_TOKEN = re.compile(r"\s+|\\[a-z]+|(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:\\%)?|\\.|.", re.S | re.I)
_SKIPPED = {"$", r"\displaystyle", r"\left", r"\right", r"\,", r"\quad"}
_CLOSING = {"(": ")", "{": "}", "[": "]", r"\{": r"\}"}
_TIMES = {"*", r"\times", r"\cdot"}
_DIVIDED = {"/", ":", r"\div"}
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    r"\sin": math.sin, r"\cos": math.cos, r"\tan": math.tan, r"\ln": math.log, r"\log": math.log10,
    r"\arcsin": math.asin, r"\arccos": math.acos, r"\arctan": math.atan,
}  # fmt: skip
_FACTORS = ("(", "{", "[", r"\frac", r"\sqrt", r"\pi", r"\binom", *_FUNCTIONS)
_ENDS = ("", ".", ")", "}", r"\end")
"""What may follow an expression; the rest of the text is not read."""
_MOST_DIGITS = 4000
_DEEPEST = 50
_LONGEST = 2000


class NoValueError(ValueError):
    """The text has no value: it does not start with an expression, or names a variable."""


def latex_value(text: str) -> float | int | None:
    """The value, or None where the text does not start with an arithmetic expression or holds a variable."""
    if len(text) > _LONGEST:
        return None
    try:
        return _Reader(text).value()
    except (NoValueError, ArithmeticError, ValueError, IndexError, RecursionError):
        return None


class _Reader:
    def __init__(self, text: str) -> None:
        plain = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
        found = [match.group() for match in _TOKEN.finditer(plain)]
        self._tokens = [token for token in found if not token.isspace() and token not in _SKIPPED]
        self._place = self._depth = 0

    def value(self) -> float | int:
        value = self._sum()
        if self._next not in _ENDS:
            raise NoValueError(self._next)
        return value

    @property
    def _next(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._next
        self._place += 1
        return token

    def _sum(self) -> float | int:
        total = self._product()
        while self._next in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            total += sign * self._product()
        return total

    def _product(self) -> float | int:
        result = self._signed()
        while True:
            if self._next in _TIMES:
                self._take()
                result = _bounded(result * self._signed())
            elif self._next in _DIVIDED:
                self._take()
                result = result / self._signed()
            elif self._starts_factor():
                result = _bounded(result * self._power())
            else:
                return result

    def _signed(self) -> float | int:
        if self._next in ("+", "-"):
            return self._signed() if self._take() == "+" else -self._signed()
        return self._power()

    def _power(self) -> float | int:
        base = self._postfix(self._atom())
        if self._next != "^":
            return base
        self._take()
        exponent = self._group_or_atom()
        if base and abs(exponent) * max(1.0, abs(math.log10(abs(base)))) > _MOST_DIGITS:
            raise NoValueError("too large")
        result = base**exponent
        if isinstance(result, complex):
            raise NoValueError("not real")
        return self._postfix(result)

    def _postfix(self, value: float | int) -> float | int:
        while self._next == "!":
            self._take()
            if value != int(value) or not 0 <= value <= _MOST_DIGITS // 4:
                raise NoValueError("no factorial")
            value = math.factorial(int(value))
        return value

    def _starts_factor(self) -> bool:
        token = self._next
        return token[:1].isdigit() or token[:1].isalpha() or token in _FACTORS

    def _atom(self) -> float | int:
        sign = self._take()
        if sign[:1].isdigit() or (sign[:1] == "." and len(sign) > 1):
            return _number(sign)
        if sign in _CLOSING:
            return self._closed(_CLOSING[sign])
        if sign in _FUNCTIONS:
            return _FUNCTIONS[sign](self._power())
        read = {r"\pi": lambda: math.pi, r"\frac": self._fraction, r"\sqrt": self._root, r"\binom": self._binomial}
        if sign not in read:
            raise NoValueError(sign)
        return read[sign]()

    def _fraction(self) -> float:
        return self._group() / self._group()

    def _binomial(self) -> int:
        return math.comb(int(self._group()), int(self._group()))

    def _root(self) -> float:
        degree: float | int = 2
        if self._next == "[":
            self._take()
            degree = self._closed("]")
        inside = self._group()
        if inside < 0:
            raise NoValueError("not real")
        return float(math.sqrt(inside) if degree == 2 else inside ** (1 / degree))

    def _group(self) -> float | int:
        if self._take() != "{":
            raise NoValueError("no group")
        return self._closed("}")

    def _group_or_atom(self) -> float | int:
        if self._next == "{":
            self._take()
            return self._closed("}")
        return self._postfix(self._atom())

    def _closed(self, end: str) -> float | int:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise NoValueError("too deep")
        value = self._sum()
        self._depth -= 1
        if self._take() != end:
            raise NoValueError("not closed")
        return value


def _bounded(value: float | int) -> float | int:
    if isinstance(value, int) and value.bit_length() > 4 * _MOST_DIGITS:
        raise NoValueError("too large")
    return value


def _number(token: str) -> float | int:
    plain = token.removesuffix(r"\%").replace(",", "")
    value = float(plain) if "." in plain else int(plain)
    return value / 100 if token.endswith("%") else value
