"""OCRBench v2: the score of an answer by the type of its question, and the capabilities that types belong to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_moslora_eval.metrics.general.lexicons import Lexicon, lexicon
from mm_moslora_eval.metrics.general.python_literals import mapping_in
from mm_moslora_eval.metrics.general.timed_calls import PROCESS, TABLE_SECONDS
from mm_moslora_eval.metrics.metric_text import levenshtein
from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.scoring.named_parts import Metric
from mm_moslora_eval.scoring.scored_sample import Samples, Summed
from mm_moslora_eval.sources.document import Document

from mm_moslora.utils.untrusted_data import parse_literal

from . import parsed_pages, spotted_text
from .text_overlap import bleu, f_measure, meteor

_LEAST_SIMILAR = 0.5
_TEXT_MARK = re.compile(r"\\text\{([^{}]*)\}")
_FEW_WORDS, _FEW_PARTS = 5, 4
"""A reference of fewer words, or in Chinese of fewer parts between commas, must lie within the answer."""
_BETWEEN = ("", ".", ". ", ",", ", ", "\u3001", ";", "; ", " ", "\u548c")
"""What may stand between the letters of a handwritten answer."""
_SHORT_ANSWER = "\u7b80\u7b54"
"""In a question: the handwritten answer is a text, not letters."""
_NO_RULE, _NO_BOX, _NO_TEXTS = "without eval", "without bbox", "without content"


@dataclass(frozen=True, kw_only=True)
class ReadingQuestion:
    """What a score depends on beside the answer."""

    kind: str
    text: str
    answers: Sequence[Any]
    rule: str = ""
    """How to compare, where the data say it: `multiple choice`, `case sensitive`, `exact match`, `regression`."""
    boxes: Any = None
    """A box, or the polygons of all texts."""
    contents: Any = ()
    """The texts in the polygons."""

    @classmethod
    def read(cls, kind: str, text: str, reference: str, columns: Mapping[str, str]) -> ReadingQuestion:
        """A row of VLMEvalKit's file, which writes lists as Python does.

        Raises:
            ValueError: a list cannot be read.
        """
        rule, boxes, contents = (columns.get(name, "") for name in ("eval", "bbox", "content"))
        answers = parse_literal(reference)
        return cls(
            kind=kind, text=text, answers=answers if isinstance(answers, list) else [answers],
            rule="" if rule == _NO_RULE else rule, boxes=None if boxes in ("", _NO_BOX) else parse_literal(boxes),
            contents=() if contents in ("", _NO_TEXTS) else parse_literal(contents),
        )  # fmt: skip

    @property
    def only(self) -> Any:
        """The reference of a question that has one.

        Raises:
            ValueError: it has none or several.
        """
        if len(self.answers) != 1:
            raise ValueError(f"the reference has {len(self.answers)} texts, expected one")
        return self.answers[0]


def asked_within(said: str, question: ReadingQuestion) -> float:
    """A short reference lies within the answer, or a longer one is similar to it by half or more; the best counts."""
    chinese, fold = question.kind.endswith(" cn"), question.rule != "case sensitive"

    def plain(text: str) -> str:
        text = (text.lower() if fold else text).strip().replace("\n", " ")
        return text.replace(" ", "") if chinese and fold else text

    return max(
        (_within_or_similar(plain(said), plain(str(one)), chinese and fold) for one in question.answers), default=0
    )


def _within_or_similar(said: str, wanted: str, chinese: bool) -> float:
    if len(wanted.split(",")) < _FEW_PARTS if chinese else len(wanted.split()) < _FEW_WORDS:
        return float(wanted in said)
    similar = 1 - levenshtein(said, wanted) / max(len(said), len(wanted))
    return similar if similar >= _LEAST_SIMILAR else 0.0


Lexicons = Callable[[], Lexicon]
"""Called for the texts of pages alone."""


def answered(said: str, question: ReadingQuestion, _: Lexicons) -> float:
    """A letter, where the answer has no others, or a text."""
    if question.rule == "multiple choice":
        return float("".join(filter(str.isalpha, said)) == question.only)
    return asked_within(said, question)


def counted(said: str, question: ReadingQuestion, _: Lexicons) -> float:
    """A number within the answer, or its first one, which may be off by less than a half of the reference."""
    wanted = [str(one).lower().strip().replace("\n", " ") for one in question.answers]
    if question.rule == "exact match":
        return max(float(one in said) for one in wanted)
    found = re.search(r"\d+", said)
    number = int(found[0]) if found and len(found[0]) < 100 else 0
    near = [1 - abs(number - int(one)) / int(one) if 0 < number < 2 * int(one) else 0.0 for one in wanted]
    return max(share if share > 0.5 else 0.0 for share in near)


def formula(said: str, question: ReadingQuestion, _: Lexicons) -> float:
    r"""A reference lies within the answer, without spaces; in Chinese `\text{}` is taken off around its content."""

    def plain(text: str) -> str:
        text = _TEXT_MARK.sub(r"\1", text) if question.kind.endswith(" cn") else text
        return text.strip().replace("\n", " ").replace(" ", "")

    return float(any(plain(one) in plain(said) for one in question.answers))


def page(said: str, question: ReadingQuestion, words: Lexicons) -> float:
    """The mean of `page_parts`."""
    if not said:
        return 0.0
    return sum(page_parts(said, str(question.answers[0]), words()).values()) / 4


def page_parts(said: str, wanted: str, words: Lexicon) -> dict[str, float]:
    """BLEU, METEOR, the F measure of the sets of words, and the similarity of the characters."""
    known, found = words.words(wanted, said)
    return {
        "bleu": bleu(found, known),
        "meteor": meteor(found, known, stem=words.stem, synonyms=words.synonyms),
        "f_measure": f_measure(found, known),
        "similarity": 1 - levenshtein(said, wanted) / max(len(said), len(wanted)),
    }


def handwritten(said: str, question: ReadingQuestion, words: Lexicons) -> float:
    """A text, or the letters of the reference within the answer, with one of some marks between them."""
    if _SHORT_ANSWER in question.text:
        return page(said, question, words)
    return float(any(mark.join(question.only) in said for mark in _BETWEEN))


def table(said: str, question: ReadingQuestion, _: Lexicons) -> float:
    """TEDS of HTML, or in English of Markdown, as the question asks."""
    asked = question.text.lower()
    if question.kind.endswith(" cn") or "html" in asked:
        return parsed_pages.html_table(said, question.only)
    if "markdown" not in asked:
        raise ValueError(f"the question {question.text[:80]!r} asks for neither HTML nor Markdown")
    return parsed_pages.markdown_table(said, question.only)


def placed(said: str, question: ReadingQuestion, _: Lexicons) -> float:
    """Half for the `answer` of a mapping, and as much of the other half as its `bbox` overlaps."""
    found = mapping_in(said)
    text = asked_within(found["answer"], question) if "answer" in found else 0.0
    try:
        box = spotted_text.overlap(parse_literal(found["bbox"]), question.boxes) if "bbox" in found else 0.0
    except ValueError:
        box = 0.0
    return 0.5 * text + 0.5 * box


def grounded(said: str, question: ReadingQuestion, _: Lexicons) -> float:
    """How much the last box of the answer overlaps that of the reference."""
    box = spotted_text.last_box(said)
    return 0.0 if box is None else spotted_text.overlap(box, question.answers)


def spotted(said: str, question: ReadingQuestion, _: Lexicons) -> float:
    """The F measure of texts in their places."""
    wanted = spotted_text.reference_spots(question.boxes, question.contents)
    return spotted_text.spotting_score(spotted_text.spots_in(said), wanted)


Scorer = Callable[[str, ReadingQuestion, Lexicons], float]
TYPES: dict[str, tuple[str, Scorer]] = {
    "text recognition en": ("text_recognition", answered),
    "fine-grained text recognition en": ("text_recognition", page),
    "full-page OCR en": ("text_recognition", page),
    "text grounding en": ("text_detection", grounded),
    "VQA with position en": ("text_detection", placed),
    "text spotting en": ("text_spotting", spotted),
    "key information extraction en": ("relationship_extraction", lambda a, q, _: parsed_pages.pairs_f1(a, q.only)),
    "key information mapping en": ("relationship_extraction", lambda a, q, _: parsed_pages.pairs_f1(a, q.only)),
    "document parsing en": ("element_parsing", lambda a, q, _: parsed_pages.outline(a, q.only)),
    "chart parsing en": ("element_parsing", lambda a, q, _: parsed_pages.chart(a, q.answers[0])),
    "table parsing en": ("element_parsing", table),
    "formula recognition en": ("element_parsing", formula),
    "math QA en": ("mathematical_calculation", answered),
    "text counting en": ("mathematical_calculation", counted),
    "document classification en": ("visual_text_understanding", answered),
    "cognition VQA en": ("visual_text_understanding", answered),
    "diagram QA en": ("visual_text_understanding", answered),
    "reasoning VQA en": ("knowledge_reasoning", answered),
    "science QA en": ("knowledge_reasoning", answered),
    "APP agent en": ("knowledge_reasoning", answered),
    "ASCII art classification en": ("knowledge_reasoning", answered),
    "full-page OCR cn": ("text_recognition", page),
    "key information extraction cn": ("relationship_extraction", lambda a, q, _: parsed_pages.pairs_f1(a, q.only)),
    "handwritten answer extraction cn": ("relationship_extraction", handwritten),
    "document parsing cn": ("element_parsing", lambda a, q, _: parsed_pages.outline(a, q.only)),
    "table parsing cn": ("element_parsing", table),
    "formula recognition cn": ("element_parsing", formula),
    "cognition VQA cn": ("visual_text_understanding", answered),
    "reasoning VQA cn": ("knowledge_reasoning", answered),
    "text translation cn": ("knowledge_reasoning", page),
}
"""Type of question -> its capability, and how answers are scored."""


def score(answer: str, kind: str, text: str, reference: str, columns: Mapping[str, str]) -> float:
    """The score of an answer, 0 to 1; the arguments are those of `ReadingQuestion.read`.

    Raises:
        ValueError: a reference or a question that cannot be read.
        MissingRequirementError: see `lexicons.lexicon`.
    """
    question = ReadingQuestion.read(kind, text, reference, columns)
    if kind not in TYPES:
        raise ValueError(f"the question type {kind!r} is not one of {', '.join(TYPES)}")
    return TYPES[kind][1](answer, question, lexicon)


def ocrbench_v2(parsed: str, document: Document, *, seconds: float = TABLE_SECONDS) -> float:
    """OCRBench v2: the score of the question's type: ANLS, F1, IoU, TEDS, BLEU with METEOR, and others.
    Pages need nltk, jieba and WordNet (extra `ocr`). An answer that takes longer than `seconds` has no score and is
    counted.
    """
    columns = {name: document.extra.get(name, "") for name in ("eval", "bbox", "content")}
    asked = {"kind": document.category or "", "text": document.question, "reference": document.answers[0]}
    return PROCESS.value(score, seconds=seconds, answer=parsed, columns=columns, **asked)


def ocrbench_v2_capabilities(samples: Samples) -> Summed:
    """OCRBench v2: the mean over the capabilities of the mean of their answers; that of every type is given beside it.

    As at the source, a translation of nothing and a table that is not asked for do not count.
    """
    counted = [float(not _ignored(sample.document)) for sample in samples]
    types = [sample.document.category or "" for sample in samples]
    capabilities = [TYPES[name][0] if name in TYPES else "" for name in types]
    scores = [sample.score for sample in samples]
    groups = _groups(capabilities, scores, counted)
    metrics = {name: ratio.values()[0] for name, ratio in (groups | _groups(types, scores, counted)).items()}
    return Summed(ratios=[ratio * (1 / len(groups)) for ratio in groups.values()], metrics=metrics)


def _ignored(document: Document) -> bool:
    asked, kind = document.question, document.category
    return (kind == "text translation cn" and document.answers[:1] in (("['']",), ('[""]',))) or (
        kind == "table parsing en" and not asked
    )


def _groups(names: Sequence[str], scores: Sequence[float], counted: Sequence[float]) -> dict[str, Ratio]:
    """The mean of the scores of every name that counts."""
    found = {}
    for name in dict.fromkeys(name for name, counts in zip(names, counted, strict=True) if counts):
        among = [counts * (other == name) for other, counts in zip(names, counted, strict=True)]
        top = [score * inside for score, inside in zip(scores, among, strict=True)]
        found[name] = Ratio(top=top, bottom=among)
    return found


METRICS: dict[str, Metric] = {"ocrbench_v2": ocrbench_v2}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"ocrbench_v2_capabilities": ocrbench_v2_capabilities}


FIRST_CALLS = {
    "score": {"answer": "\u4e00", "kind": "full-page OCR cn", "text": "", "reference": "['\u4e00']", "columns": {}}
}
"""Arguments of a first call in a process of its own, which imports what a comparison needs."""
