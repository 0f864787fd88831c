"""OmniDocBench's end-to-end scores of one page: edits of texts, formulas and tables, TEDS, and the order of reading.

Source: github.com/opendatalab/OmniDocBench, v1.0 at f41a4ec and v1.5 at 0f22218. CDM needs a renderer of LaTeX and is
not computed. A table in LaTeX scores 0, as in v1.5; v1.0 converts it by LaTeXML.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mm_moslora_eval.metrics.documents.block_matching import IGNORED, Pair, no_split, quick_match, simple_match
from mm_moslora_eval.metrics.documents.html_tables import TableReader, compared_table, spans_are_numbers
from mm_moslora_eval.metrics.documents.markdown_blocks import (
    FORMULA,
    HTML,
    INLINE,
    LATEX,
    TEXT,
    Block,
    formula_norm,
    latex_text,
    letters_of,
    markdown_blocks,
    text_norm,
)
from mm_moslora_eval.metrics.general.table_similarity import teds
from mm_moslora_eval.metrics.metric_text import levenshtein

MOST_CHARACTERS = 200_000
"""Characters of an answer that are read; the longest pages have a tenth of it."""
_TEXTS = ("text_block", "title", "code_txt", "code_txt_caption", "reference", "equation_caption", "figure_caption",
          "figure_footnote", "table_caption", "table_footnote", "code_algorithm", "code_algorithm_caption", "header",
          "footer", "page_footnote", "page_number")  # fmt: skip
_COLUMN = re.compile(r"\\begin\{array\}\{([^}]*)\}(.*?)\\end\{array\}", re.S)
Item = Mapping[str, Any]


def page_numbers(annotation: Item, answer: str, *, old: bool, match: str = "quick") -> dict[str, list[float]]:
    """What the scores of a set are made of.

    Args:
        annotation: a page of `OmniDocBench.json`.
        answer: the page in Markdown.
        old: by v1.0; else by v1.5.
        match: `quick`, or of v1.0 `simple` or `no_split`.

    Returns:
        Of `text`, `formula`, `table` and `order`: edits and length of what is compared; of `teds` and
            `teds_structure`: a value for every table.
    """
    truth = _elements(annotation)
    found: dict[str, list[Block]] = defaultdict(list)
    for block in markdown_blocks(answer[:MOST_CHARACTERS], old=old):
        found[FORMULA if block.kind == INLINE else block.kind].append(block)
    tables, unused = _tables(truth["table"], found.pop(HTML, []), found.pop(LATEX, []))
    texts, formulas = _old_pairs(truth, found, match) if old else _pairs(truth, found, unused)
    order = _order([pair for pair in texts if pair.kind not in IGNORED])
    if not old:
        formulas, others = _as_text(formulas)
        texts += others
    compared: dict[str, list[tuple[Sequence[Any], Sequence[Any]]]] = {
        "text": [(pair.norm_truth or pair.truth, pair.norm_found) for pair in texts if pair.kind not in IGNORED],
        "formula": [(pair.norm_truth or pair.truth, pair.norm_found) for pair in formulas],
        "order": [order],
        "table": [*tables],
    }
    numbers = {name: _edits(pairs) for name, pairs in compared.items()}
    numbers["teds"] = [_teds(*pair, structure_only=False) for pair in tables]
    numbers["teds_structure"] = [_teds(*pair, structure_only=True) for pair in tables]
    return numbers


def _edits(pairs: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> list[float]:
    listed = list(pairs)
    return [sum(levenshtein(*pair) for pair in listed), sum(max(map(len, pair)) for pair in listed)]


def _elements(annotation: Item) -> dict[str, list[Item]]:
    """The elements of a page by kind; texts that a page break or a column cuts are one."""
    groups: list[list[Any]] = []
    for relation in (annotation.get("extra") or {}).get("relation") or ():
        if relation["relation_type"] == "truncated":
            ends = [relation["source_anno_id"], relation["target_anno_id"]]
            known = [group for group in groups if set(group) & set(ends)]
            for group in known:
                group += ends
            groups += [] if known else [ends]
    cut = {name for group in groups for name in group}
    elements: dict[str, list[Item]] = defaultdict(list)
    by_name: dict[Any, Item] = {}
    for item in annotation["layout_dets"]:
        if item["anno_id"] in cut:
            by_name[item["anno_id"]] = item
        else:
            elements[item["category_type"]].append(item)
    for group in groups:  # a text in the middle of three is counted twice, as in the source
        parts = sorted((by_name[name] for name in group), key=lambda item: item["order"])
        whole = {key: parts[0][key] for key in ("category_type", "order")}
        elements[parts[0]["category_type"]].append({**whole, "text": "".join(part["text"] for part in parts)})
    return elements


def _sorted(items: Iterable[Item]) -> list[Item]:
    return sorted(items, key=lambda item: item.get("order") or 0)


def _text(item: Item, key: str) -> str:
    if item.get(key) is None:
        raise ValueError(f"an element {item['category_type']!r} of the annotation has no {key}")
    return str(item[key])


def _truth(item: Item, *, old: bool) -> Block:
    formula = item["category_type"] == FORMULA
    text = _text(item, "latex" if formula else "text")
    return Block(
        kind=item.get("fine_category_type") or item["category_type"], text=text, place=item.get("order") or 0,
        norm=formula_norm(text, old=old) if formula else text_norm(text),
    )  # fmt: skip


def _with_norm(block: Block, *, old: bool) -> Block:
    formula = block.kind in (FORMULA, INLINE)
    return replace(block, norm=formula_norm(block.text, old=old) if formula else text_norm(block.text))


def _old_pairs(truth: Mapping[str, list[Item]], found: Mapping[str, list[Block]], match: str) -> list[list[Pair]]:
    """Pairs of texts and of formulas, which v1.0 matches apart."""
    ways = {"quick": lambda *sides: quick_match(*sides, old=True), "simple": simple_match, "no_split": no_split}
    texts = _sorted(item for kind in _TEXTS for item in truth.get(kind, ()))
    pairs = []
    for items, kind in ((texts, TEXT), (_sorted(truth.get(FORMULA, ())), FORMULA)):
        blocks = [_with_norm(block, old=True) for block in found.get(kind, ())]
        pairs.append(ways[match]([_truth(item, old=True) for item in items], blocks) if items else [])
    return [pairs[0], [pair for pair in pairs[1] if pair.orders]]


def _pairs(
    truth: Mapping[str, list[Item]], found: Mapping[str, list[Block]], tables: Iterable[Block]
) -> list[list[Pair]]:
    """Pairs of texts and of formulas, which v1.5 matches together, with the cells of tables that belong to none."""
    items = _sorted(item for kind in (*_TEXTS, FORMULA) for item in truth.get(kind, ()))
    blocks = [block for some in found.values() for block in some]
    blocks += [
        replace(table, kind=TEXT, text=re.sub(r"\$\\cdot\$", "", cell).strip())
        for table in tables
        for cell in TableReader(table.text).cells
    ]
    blocks.sort(key=lambda block: (block.kind == INLINE, block.place))
    pairs = quick_match(
        [_truth(part, old=False) for item in items for part in _split_truth(item)],
        [_with_norm(part, old=False) for block in blocks for part in _split_found(block)],
        old=False,
    )
    return [[pair for pair in pairs if pair.kind in _TEXTS], [pair for pair in pairs if pair.kind == FORMULA]]


def _lines(text: str) -> tuple[list[str], int]:
    """The lines of a formula that is an array of one column, and where they begin; else none."""
    match = _COLUMN.search(text)
    if match is None:
        return [], 0
    form = re.sub(r"[@!]\{[^}]*\}", "", re.sub(r"\s+|\|", "", match[1]))
    body = match[2] if form in ("l", "c", "r") else ""
    return [line.strip() for line in body.split("\\\\") if line.strip()], match.start(2)


def _split_truth(item: Item) -> list[Item]:
    lines = _lines(_text(item, "latex"))[0] if item["category_type"] == FORMULA else []
    order = float(item.get("order") or 0)
    numbered = enumerate(lines, start=1)
    return [{**item, "latex": f"\\[{line}\\]", "order": round(order + n / 10, 1)} for n, line in numbered] or [item]


def _split_found(block: Block) -> list[Block]:
    lines, start = _lines(block.text) if block.kind in (FORMULA, INLINE) else ([], 0)
    blocks, body, last = [], block.text[start:], 0
    for line in lines:
        last = max(body.find(line, last), last)
        blocks.append(replace(block, text=f"\\[{line}\\]", place=block.place + start + last))
        last += len(line)
    return blocks or [block]


def _as_text(pairs: Iterable[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Formulas, and those that the answer writes as text, which are compared as texts."""
    formulas, others = [], []
    for pair in pairs:
        if pair.found in (FORMULA, INLINE, ""):
            formulas.append(pair)
        else:
            plain = letters_of(pair.truth) and not re.search(r"[\\{}^_%~&]", pair.truth)
            text = pair.truth if plain else latex_text(pair.truth)
            others.append(replace(pair, truth=text, norm_truth=letters_of(text), kind="text_block"))
    return formulas, others


def _order(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """The places of the annotation's texts in order, and in the order of the answer."""
    found = [(pair.place, pair.orders) for pair in pairs if pair.place is not None and any(pair.orders)]
    said = [place for _, orders in sorted(found, key=lambda one: one[0]) for place in orders if place]
    return sorted(place for pair in pairs for place in pair.orders if place), said


def _tables(
    items: Sequence[Item], html: Sequence[Block], latex: Sequence[Block]
) -> tuple[list[tuple[str, str]], list[Block]]:
    """Tables of the annotation with those of the answer as they are compared, and those that belong to none."""
    if not items:
        return [], []
    written = "latex" if len(latex) > len(html) else "html"
    ordered = _sorted(items)
    truth = [
        Block(kind="table", text=str(item.get("html") or ""), norm=str(item.get(written) or "")) for item in ordered
    ]
    found = [replace(block, norm=block.text) for block in (latex if written == "latex" else html)]
    pairs = [pair for pair in simple_match(truth, found) if pair.kind]
    if written == "latex":
        return [(compared_table(pair.truth) or pair.truth, "") for pair in pairs], []
    compared = [
        (compared_table(pair.truth) or pair.truth, compared_table(pair.norm_found) or pair.norm_found)
        for pair in pairs
    ]  # fmt: skip
    unused = list(found)
    for pair in pairs:
        match = next((block for block in unused if block.text == pair.norm_found), None)
        unused = [block for block in unused if block is not match]
    return compared, unused


def _teds(truth: str, found: str, *, structure_only: bool) -> float:
    if not truth or not found or not (spans_are_numbers(truth) and spans_are_numbers(found)):
        return 0.0
    return teds(found, truth, structure_only=structure_only, signed=True)
