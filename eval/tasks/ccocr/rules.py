"""CC-OCR: F1 of read text, fields by Donut's two measures (Kim et al. 2022, 2111.15664), and parsed documents."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mm_moslora_eval.metrics.exact_match import best
from mm_moslora_eval.metrics.general.python_literals import literal_or_json
from mm_moslora_eval.metrics.general.table_similarity import teds
from mm_moslora_eval.metrics.general.timed_calls import PROCESS, TABLE_SECONDS
from mm_moslora_eval.metrics.general.tree_distance import tree_distance
from mm_moslora_eval.metrics.metric_text import FULL_WIDTH, levenshtein
from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.scoring.named_parts import Metric
from mm_moslora_eval.scoring.parts.grouped_scores import values_of
from mm_moslora_eval.scoring.scored_sample import Numbers, Samples, Scored, Summed
from mm_moslora_eval.sources.document import Document

from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json

_BY_CHARACTER = ("Arabic", "Japanese", "Korean")
_NO_ALPHANUMERIC = re.compile(r"[^A-Za-z0-9]+")


def text_f1(text: str, reference: str, *, split: str, group: str) -> float:
    """F1 of two bags of words in lower case; of characters in Arabic, Chinese, Japanese and Korean splits.

    Args:
        text: what was read.
        reference: what is written.
        split: name of the sub-set, such as `Arabic` or `zh_doc`.
        group: `multi_lan_ocr` or `multi_scene_ocr`, in which only Latin letters and digits of words count.
    """
    by_word = split not in _BY_CHARACTER and "zh" not in split
    latin = by_word and "multi_scene_ocr" in group
    found, wanted = (_tokens(part.strip(), by_word=by_word, latin=latin) for part in (text, reference))
    right = (Counter(found) & Counter(wanted)).total()
    return 2 * right / (len(found) + len(wanted)) if right else 0.0


def _tokens(text: str, *, by_word: bool, latin: bool) -> list[str]:
    plain = re.sub(r"\s+", " ", text.replace("###", "").replace("***", ""))
    parts = plain.split(" ") if by_word else list(plain.replace(" ", ""))
    lowered = [part.lower() for part in parts]
    return [part for part in (_NO_ALPHANUMERIC.sub("", one) if latin else one for one in lowered) if part]


MOST_CHARACTERS = 100_000
"""Longest answer in which LaTeX commands are searched; in a longer one, which scores next to nothing, they stay."""
_COMMANDS = [
    re.compile(pattern)
    for pattern in (
        r"\\documentclass\{.*?\}", r"\\usepackage\[.*?\]\{.*?\}", r"\\usepackage\{.*?\}", r"\\geometry\{.*?\}",
        r"\\begin\{document\}", r"\\end\{document\}", r"\\noindent",
    )
]  # fmt: skip
_LATEX, _HTML, _BLOCK = "```latex", "```html", "```"
_TAG = re.compile(r"(</?[A-Za-z][A-Za-z0-9:_.-]*)(?=[^A-Za-z0-9:_.>/-])")
_TABLE = "table"


def document_texts(answer: str, reference: str, kind: str) -> tuple[str, str]:
    """What is compared of an answer and a reference of a kind: `doc`, `table`, `formula` or `molecular`.

    Raises:
        ValueError: another kind.
    """
    if kind == "doc":
        parts = _without_commands(answer).split(_BLOCK, 2)
        return _dense(parts[min(1, len(parts) - 1)]), _dense(reference)
    if kind == _TABLE:
        parts = _without_commands(answer).split(_HTML, 2)
        found = _dense(parts[min(1, len(parts) - 1)].replace(_BLOCK, "")).replace("\uff0c", ",")
        return _parted(found), _parted(_dense(reference))
    if kind == "formula":
        plain = answer.replace("\n", " ").replace(_LATEX, "").replace(_BLOCK, "").replace("\t", " ")
        return plain.replace(" ", ""), reference.replace(" ", "")
    if kind == "molecular":
        return _dense(answer).replace("<smiles>", "").replace("</smiles>", ""), reference.replace(" ", "")
    raise ValueError(f"the column l2-category is {kind!r}, expected doc, table, formula or molecular")


def _without_commands(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        for command in _COMMANDS:
            text = command.sub("", text)
    return text


def _dense(text: str) -> str:
    return text.replace(" ", "").replace("\n", "")


def _parted(table: str) -> str:
    """Tags whose name ends where a parser of HTML ends it: `<tdcolspan="2">` is `tdcolspan`, and no cell."""
    return _TAG.sub(r"\1 ", table)


def _similarity(answer: str, reference: str) -> float:
    """1 less the edit distance as a share of the longer text."""
    return 1 - levenshtein(answer, reference) / (max(len(answer), len(reference)) or 1)


MOST_NODES = 2500
"""Keys and values of an answer that is compared; a larger one scores 0."""
_FENCE, _END = "```json", "```"
_LEAF, _ROOT, _ITEM = "<leaf>", "<root>", "<subtree>"
_SIGNS = FULL_WIDTH | {0x3001: ","}
_SPACES = [
    (re.compile(pattern), text)
    for pattern, text in (
        (r"\s+", " "),  # first, so that the others take no long time
        (r"(?<=[\u4e00-\u9fff])\s(?=[\u4e00-\u9fffa-zA-Z0-9])", ""), (r"(?<=[a-zA-Z0-9])\s(?=[\u4e00-\u9fff])", ""),
        (r"(?<![0-9])\s?([,.!?:;])\s?", r"\1 "), (r"(?<=[0-9])(?=[a-zA-Z])", " "), (r"(?<=[a-zA-Z])(?=[0-9])", " "),
        (r"\s+", " "),
    )
]  # fmt: skip
Field = tuple[str, str]


def field_counts(answer: str, reference: str) -> tuple[int, float]:
    """The fields that answer and reference share, and half of what both have.

    Their ratio is F1; summed over pictures, it is the F1 of a data set.
    """
    found, wanted = _fields(answer), _fields_of_reference(reference)
    return (Counter(found) & Counter(wanted)).total(), (len(found) + len(wanted)) / 2


def f1(answer: str, reference: str) -> float:
    """F1 of the fields: a field is right if its key, from the outermost on, and its value are equal."""
    shared, half = field_counts(answer, reference)
    return shared / half if half else 0.0


def tree_similarity(answer: str, reference: str) -> float:
    """1 less the edits of the tree of keys and values, as a share of what writing the reference costs; at least 0."""
    root, found = _tree(_ordered(_reference(reference))), _tree(_ordered(_said(answer)))
    whole = sum(map(_cost, _nodes(root))) - _cost(root)
    if not whole:
        raise ValueError(f"the reference {reference[:80]!r} has no field")
    if sum(1 for _ in _nodes(found)) > MOST_NODES:
        return 0.0
    return max(0.0, 1 - tree_distance(found, root, change=_change, cost=_cost) / whole)


def _fields(answer: str) -> list[Field]:
    return list(_flat(_ordered(_said(answer))))


def _fields_of_reference(reference: str) -> list[Field]:
    return list(_flat(_ordered(_reference(reference))))


def _reference(text: str) -> Any:
    value = literal_or_json(text)
    if value is None:
        raise ValueError(f"the reference {text[:80]!r} is no JSON")
    return _cleaned(value)


def _said(answer: str) -> Any:
    """What the first JSON block of an answer holds, or the whole answer; an empty mapping if it cannot be read."""
    start = answer.find(_FENCE)
    if start >= 0:
        end = answer.find(_END, start + len(_FENCE))
        answer = answer[start + len(_FENCE) : end] if end >= 0 else ""
    try:
        value = parse_json(answer.strip().replace("\n", ""), constants=True, repeats=True)
    except StrictJsonError:
        value = None
    return {} if value is None else _cleaned(value)


def _cleaned(value: Any) -> Any:
    """Texts with the signs of ASCII and even spaces. As at the source, the texts in a list stay as they are."""
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) if isinstance(item, dict) else item for item in value]
    if not isinstance(value, str):
        return value
    text = value.translate(_SIGNS)
    for pattern, part in _SPACES:
        text = pattern.sub(part, text)
    return text


def _ordered(value: Any) -> Any:
    """Mappings by the length of their keys, with lists as values; lists of mappings or of texts."""
    if isinstance(value, dict):
        items = ((key, _ordered(value[key])) for key in sorted(value, key=lambda key: (len(key), key)))
        return {key: item if isinstance(item, list) else [item] for key, item in items if item}
    if isinstance(value, list):
        if all(isinstance(item, dict) for item in value):
            return [part for part in map(_ordered, value) if part]
        return [text for item in value if type(item) in (str, int, float) and (text := str(item).strip())]
    return [str(value).strip()]


def _flat(value: Any, key: str = "") -> Iterator[Field]:
    """The values with their keys, joined by periods."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item, key)
    else:
        yield key, value


@dataclass
class _Part:
    """A key, an item of a list, or a value."""

    label: str
    children: list[_Part] = field(default_factory=list)


def _tree(value: Any, label: str = _ROOT) -> _Part:
    if isinstance(value, dict):
        return _Part(label, [_tree(item, key) for key, item in value.items()])
    return _Part(label, [_tree(item, _ITEM) if isinstance(item, dict) else _Part(_LEAF + item) for item in value])


def _nodes(root: _Part) -> Iterator[_Part]:
    waiting = [root]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += part.children


def _cost(part: _Part) -> float:
    return len(part.label.replace(_LEAF, "")) if _LEAF in part.label else 1


def _change(a: _Part, b: _Part) -> float:
    leaves = [_LEAF in part.label for part in (a, b)]
    if all(leaves):
        return levenshtein(a.label.replace(_LEAF, ""), b.label.replace(_LEAF, ""))
    if any(leaves):
        return 1 + _cost(a if leaves[0] else b)
    return float(a.label != b.label)


def ccocr_text(parsed: str, document: Document) -> float:
    """CC-OCR: F1 of the words, or of the characters by the sub-set in `split`, whatever their order."""
    split, group = document.extra.get("split", ""), document.category or ""
    return best(lambda text, reference: text_f1(text, reference, split=split, group=group), parsed, document.answers)


def ccocr_fields_f1(parsed: str, document: Document) -> float:
    """CC-OCR, key information: F1 of the fields of a JSON answer."""
    return f1(parsed, document.answers[0])


def ccocr_fields_tree(parsed: str, document: Document, *, seconds: float = TABLE_SECONDS) -> float:
    """CC-OCR, key information: 1 less the edits of the tree of fields (nTED).
    An answer that takes longer than `seconds` has no score and is counted.
    """
    return PROCESS.value(tree_similarity, seconds=seconds, answer=parsed, reference=document.answers[0])


def ccocr_document(parsed: str, document: Document, *, seconds: float = TABLE_SECONDS) -> float:
    """CC-OCR, documents: TEDS of a table, edit similarity of a page, a formula or a molecule, without spaces.
    A table that takes longer than `seconds` has no score and is counted.
    """
    kind = document.extra.get("l2-category", "")
    answer, reference = document_texts(parsed, document.answers[0], kind)
    if kind == _TABLE:
        return PROCESS.value(teds, seconds=seconds, answer=answer, reference=reference)
    return _similarity(answer, reference)


def _half_of_fields(sample: Scored) -> float:
    """Half the fields of an answer and its reference; of a faulty reference none, as its answers have no score."""
    try:
        return field_counts(sample.parsed, sample.document.answers[0])[1]
    except ValueError:
        return 0.0


def ccocr_fields_sets(samples: Samples, *, column: str = "split") -> Summed:
    """CC-OCR, key information: the mean over the sub-sets in `column` of F1 over the fields of all their pictures."""
    names = [name for (name,) in values_of(samples, (column,), named="ccocr_fields_sets")]
    members: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        members[name].append(number)
    halves = [_half_of_fields(sample) for sample in samples]
    ratios, metrics = [], Numbers()
    for name, numbers in members.items():
        top, bottom = [0.0] * len(names), [0.0] * len(names)
        for number in numbers:
            top[number] = samples[number].score * halves[number]
            bottom[number] = halves[number]
        ratio = Ratio(top=top, bottom=bottom)
        metrics[name] = ratio.values()[0]
        ratios.append(ratio * (1 / len(members)))
    return Summed(ratios=ratios, metrics=metrics)


METRICS: dict[str, Metric] = {
    "ccocr_text": ccocr_text,
    "ccocr_fields_f1": ccocr_fields_f1,
    "ccocr_fields_tree": ccocr_fields_tree,
    "ccocr_document": ccocr_document,
}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"ccocr_fields_sets": ccocr_fields_sets}


FIRST_CALLS = {"tree_similarity": {"answer": "{}", "reference": '{"a": "b"}'}}
"""Arguments of a first call in a process of its own, which imports what a comparison needs."""
