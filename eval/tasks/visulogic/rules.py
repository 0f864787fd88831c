"""VisuLogic: letters of lmms-eval and VLMEvalKit."""

from __future__ import annotations

import re

from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import of_text

_VISULOGIC = (
    re.compile(r"<answer>\s*\(?([A-D])\)?\s*</answer>", re.I),
    re.compile(r"\\boxed\{\s*([A-D])\s*\}", re.I),
    re.compile(r"answer\s*(?:is|:|-)\s*\(?([A-D])\)?\b", re.I),
    re.compile(r"option\s*([A-D])\b", re.I),
    re.compile(r"\(([A-D])\)", re.I),
)


def visulogic_lmms_eval(text: str) -> str:
    """lmms-eval for VisuLogic: the last `<answer>X</answer>`, `\\boxed{X}`, `answer is X`, `option X` or `(X)`."""
    stripped = text.strip()
    for pattern in _VISULOGIC:
        found = pattern.findall(stripped)
        if found:
            return str(found[-1]).upper()
    first = stripped[:1].upper()
    return first if len(stripped) <= 3 and first in tuple("ABCD") else ""


_BOX = re.compile(r"\\boxed\{|[^\\]\}")
_SAYS = (
    "answer:", "the final answer is:", "the answer is option:", "the answer is:", "the correct answer is option:",
    "the correct answer is:", "the answer should be:", "the final answer is", "the answer is option", "the answer is",
    "the correct answer is option", "the correct answer is", "the answer should be",
)  # fmt: skip


def visulogic_vlmevalkit(text: str) -> str:
    r"""VLMEvalKit for VisuLogic: the last `\boxed{X}`, else a letter at an end or after `the answer is`."""
    boxed = _last_box(text).strip()
    return boxed if boxed in tuple("ABCD") else _said_letter(text)


def _last_box(text: str) -> str:
    """The content of the last outermost box without LaTeX; the whole text where it is no letter."""
    if len(text) < 3:
        return text
    starts: list[int] = []
    last = None
    for match in _BOX.finditer(text):
        if match[0].endswith(r"\boxed{"):
            starts.append(match.end())
        elif starts:
            start = starts.pop()
            if not starts:
                last = text[start : match.start() + 1]
    if not last:
        return text
    for command in (r"\text{", r"\rm{", r"\mathbf{", "$", "}"):
        last = last.replace(command, "")
    return text if "letter" in last.lower() or "or" in last or len(last) > 2 else last


def _said_letter(text: str) -> str:
    text = text.replace("<|endoftext|>", "")
    for letter in "ABCD":
        starts = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.endswith((f" {letter}.", f" ({letter}).")) or text.startswith(starts):
            return letter
    lowered = text.lower()
    for phrase in _SAYS:
        if phrase in lowered:
            lowered = lowered.split(phrase)[-1].strip().split("\n")[0].split(".")[0]
            if lowered.upper() in tuple("ABCD"):
                return lowered.upper()
    return text if text in tuple("ABCD") else ""


EXTRACTORS: dict[str, Extractor] = {
    "visulogic_lmms_eval": of_text(visulogic_lmms_eval),
    "visulogic_vlmevalkit": of_text(visulogic_vlmevalkit),
}
