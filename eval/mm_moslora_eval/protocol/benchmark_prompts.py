"""Prompts of single benchmarks that a template cannot express."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from mm_moslora_eval.sources.document import Document

_BOXED = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
    'question, only one letter is allowed in the "\\boxed{}".\n'
)


def _mathvision(document: Document, *, before: str, after: str) -> str:
    """Options that are nothing but their letters are in the picture and are not listed."""
    bare = all(letter == text for letter, text in document.options.items())
    options = "" if bare else "".join(f"({letter}) {text}\n" for letter, text in document.options.items())
    return f"{before}{document.question}\n{options}{after}"


_DISCLAIMER = (
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give your "
    "assessment on this question. You don't need to identify the real people. You just need to analyze based on the "
    "information I gave you.\n\n"
)
_WITH_PEOPLE = ("Forensic_Detection", "Jigsaw", "Art_Style")


def _blink(document: Document) -> str:
    prompt = document.extra.get("prompt", "")
    return _DISCLAIMER + prompt if document.category in _WITH_PEOPLE else prompt


def _letters_only(document: Document, *, between: str) -> str:
    letters = ", ".join(document.options)
    ask = f"Note: You only need to respond with {letters} without providing any additional information.\n"
    return f"{ask}{between}{document.extra.get('prompt', '')}"


def _cv_bench_vlmevalkit(document: Document) -> str:
    """The data set's own prompt with options as VLMEvalKit's files write them: `A red` in place of `(A) red`."""
    return re.sub(r"(?m)^\((\w)\)", r"\1", document.extra.get("prompt", ""))


def _vstar(document: Document) -> str:
    """The question as the data writes it, up to its options, which get periods."""
    options = "".join(f"\n{letter}. {text}" for letter, text in document.options.items())
    question = document.question.split("(A)")[0].strip()
    return f"{question}{options}\nAnswer with the option's letter from the given choices directly."


_NATURALBENCH = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}


def _naturalbench(document: Document) -> str:
    kind = document.extra.get("Question_Type") or document.extra.get("type", "")
    return f"{document.question} {_NATURALBENCH.get(kind, '')}".rstrip(" ")


_DYNAMATH = {
    "multiple choice": (
        "Provide the corresponing choice option in the 'short answer' key, such as 'A', 'B', 'C', or 'D'."
    ),
    "float": "Format the answer as a three-digit floating-point number and provide it in the 'short answer' key.",
}  # the source's own spelling


def _dynamath(document: Document) -> str:
    other = "Float numbers in the answer should be formatted as three-digit floating-point numbers."
    form = _DYNAMATH.get(document.extra.get("answer_type", ""), other)
    return (
        f"## Question\n {document.question}\n## Answer Instruction Please provide an answer to the question outlined "
        "above. Your response should adhere to the following JSON format, which includes two keys: 'solution' and "
        "'short answer'. The 'solution' key can contain detailed steps needed to solve the question, and the 'short "
        f"answer' key should provide a concise response. {form}\n\nExample of expected JSON response format:\n\n"
        '{\n    "solution": "[Detailed step-by-step explanation]",\n    "short answer": "[Concise Answer]"\n}'
    )


BENCHMARK_WORDINGS: dict[str, Callable[[Document], str]] = {
    "mathvision": partial(_mathvision, before="", after="\nAnswer the question using a single word or phrase."),
    "mathvision_step_by_step": partial(_mathvision, before=_BOXED, after=""),
    "blink": _blink,
    "blink_lmms_eval": partial(_letters_only, between=""),
    "cv_bench_lmms_eval": partial(_letters_only, between="\n"),
    "cv_bench_vlmevalkit": _cv_bench_vlmevalkit,
    "vstar_lmms_eval": _vstar,
    "naturalbench": _naturalbench,
    "dynamath": _dynamath,
}
"""Name -> the user's text for a document."""
