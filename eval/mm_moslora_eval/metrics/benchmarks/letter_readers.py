"""Letters as the evaluation code of single benchmarks and harnesses reads them.

Each function takes the answer, and the options where the source uses them, and returns a letter or an empty string.
Where a source draws a letter at random or asks a language model, the answer is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mm_moslora_eval.metrics.multiple_choice import mmmu_lmms_eval

Options = Mapping[str, str]


def mmmu_pro_official(text: str, options: Options) -> str:
    """MMMU-Pro: the only option letter after the last `Answer:`, else MMMU's rules with `X.`."""
    _, found, after = text.rpartition("Answer:")
    named = [letter for letter in options if letter in after] if found else []
    return named[0] if len(named) == 1 else mmmu_lmms_eval(text, options)


def mmmu_pro_vlmevalkit(text: str) -> str:
    """VLMEvalKit's step before its rules for answers with reasoning: what follows `Answer:` in the last such line."""
    lines = [line.strip() for line in text.strip().split("\n")]
    last = next((line for line in reversed(lines) if line.startswith("Answer:")), None)
    if last is None:
        return text
    tail = last.removeprefix("Answer:")
    capitals = set(re.findall(r"[A-Z]", tail))
    return capitals.pop() if len(capitals) == 1 else tail


def blink_official(text: str, options: Options) -> str:
    """BLINK: the bare letter, or the only `(X)` of the last paragraph or of the answer, without its language model."""
    if text in tuple("ABCDE"):
        return text
    bracketed = {f"({letter})": letter for letter in options}
    named = bracketed.keys() & set(text.split())
    last = bracketed.keys() & set(text.split("\n\n")[-1].split())
    if not named or (len(named) != 1 and len(last) != 1):
        return ""
    return bracketed[(last if len(last) == 1 else named).pop()]


_LEADING = re.compile(r"[(\s]*([A-Z])[).\s]*", re.I)


def first_letter_lmms_eval(text: str) -> str:
    """lmms-eval for BLINK and CV-Bench: the first letter of the answer, so `The answer is A` reads as T."""
    match = _LEADING.match(text.strip())
    return match[1].upper() if match else ""


_VSTAR = (
    re.compile(r"^([A-D])\s*[.)\]]*"),
    re.compile(r"(?:THE\s+)?(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])"),
    re.compile(r"\(([A-D])\)"),
    re.compile(r"([A-D])\s*(?:\.|\)|])"),
    re.compile(r"(?:^|\s)([A-D])(?:\s|$)"),
)


def vstar_lmms_eval(text: str) -> str:
    """lmms-eval for V*: a letter at the start (so `Dog` is D), after `answer is`, in brackets, or alone."""
    upper = text.strip().upper()
    found = _first_match(_VSTAR, upper)
    letters = re.findall(r"[A-D]", upper)
    return found or (letters[0] if len(letters) == 1 else "")


_MMVP = (
    re.compile(r"^\s*\(?([AB])\)?\.?\s*$", re.I),
    re.compile(r"^\s*\(?([AB])\)?[.\s]", re.I),
    re.compile(r"answer\s+is\s+\(?([AB])\)?", re.I),
    re.compile(r"option\s+\(?([AB])\)?", re.I),
    re.compile(r"\(?([AB])\)?(?:\s|$)", re.I),
)


def mmvp_lmms_eval(text: str) -> str:
    """lmms-eval for MMVP: A or B in several forms, also at the end of a word (so `grab it` is B)."""
    stripped = text.strip()
    first = stripped[:1].upper()
    return _first_match(_MMVP, stripped).upper() or (first if first in ("A", "B") else "")


def _first_match(patterns: tuple[re.Pattern[str], ...], text: str) -> str:
    return next((match[1] for pattern in patterns if (match := pattern.search(text))), "")


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


def naturalbench(text: str, kind: str) -> str:
    """NaturalBench: `Yes` or `No`, or A or B, whichever word is first; the article `a` counts as A."""
    first, second = ("Yes", "No") if kind == "yes_no" else ("A", "B")
    one, other = (re.search(rf"\b{word}\b", text, re.I) for word in (first, second))
    if one and other:
        return first if one.start() < other.start() else second
    return first if one else second if other else ""


_MME_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip


def mme_realworld(text: str) -> str:
    """MME-RealWorld: the first capital from A to E behind the usual beginnings, so `An apple` is A."""
    text = text.strip()
    for prefix in _MME_PREFIXES:
        text = text.replace(prefix, "")
    match = re.search(r"[ABCDE]", text)
    if match:
        return match[0]
    lowered = text.lower()
    return next((letter for letter in "ABCDE" if len(text.split()) <= 10 and lowered in f"({letter.lower()})"), "")


def mme_realworld_vlmevalkit(text: str) -> str:
    """VLMEvalKit for MME-RealWorld: the same within `<answer>...</answer>` where there is one."""
    _, _, after = text.partition("<answer>")
    said, closed, _ = after.partition("</answer>")
    return mme_realworld(said.strip().upper() if closed else text)


def wemath_vlmevalkit(text: str) -> str:
    """VLMEvalKit for We-Math without a judge: the first sign behind the last `Answer`, if it is from A to H."""
    tail = re.sub(r"[<>:.]", "", text.split("Answer")[-1].strip()).strip()
    return tail[:1] if tail[:1] in tuple("ABCDEFGH") else ""
