"""The part of an answer that is read: reasoning before it is no answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Markers = tuple[str, str]
"""Texts before and after the reasoning."""
THINK: Markers = ("<think>", "</think>")


@dataclass(frozen=True)
class Visible:
    """An answer without its thinking."""

    text: str
    thought: bool
    """A block was removed."""
    unclosed: bool
    """A block has no end: the text was cut off before the answer, so there is nothing to extract."""


def without_thinking(text: str, markers: Sequence[Markers] = (THINK,)) -> Visible:
    """Remove blocks of reasoning, such as `<think>...</think>`, from an answer.

    If the chat template opens the block, the answer contains only its end; the text before that is removed too.
    """
    rest = text
    for start, end in markers:
        rest = _without_blocks(rest, start, end).rsplit(end, 1)[-1]
        if start in rest:
            return Visible("", True, True)
    return Visible(rest.strip(), True, False) if rest != text else Visible(text, False, False)


def _without_blocks(text: str, start: str, end: str) -> str:
    """The text between blocks; one without an end stays. Linear in the text, which may consist of markers."""
    kept, place = [], 0
    while (begin := text.find(start, place)) >= 0 and (close := text.find(end, begin + len(start))) >= 0:
        kept.append(text[place:begin])
        place = close + len(end)
    return "".join([*kept, text[place:]])
