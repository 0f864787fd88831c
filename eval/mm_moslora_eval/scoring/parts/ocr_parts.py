"""Metrics and aggregations of benchmarks of read text: OCRBench v2 and CC-OCR."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from mm_moslora_eval.metrics.benchmarks import ccocr, ccocr_documents, ccocr_fields
from mm_moslora_eval.metrics.benchmarks import ocrbench_v2 as reading
from mm_moslora_eval.metrics.exact_match import best
from mm_moslora_eval.metrics.general.table_similarity import teds
from mm_moslora_eval.metrics.general.timed_calls import PROCESS
from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.parts.comparison_parts import TABLE_SECONDS
from mm_moslora_eval.scoring.parts.grouped_scores import values_of
from mm_moslora_eval.scoring.scored_sample import Numbers, Samples, Scored, Summed
from mm_moslora_eval.sources.document import Document

_KIND = "l2-category"


def unchanged(text: str, document: Document) -> str:
    """The answer as it is, with the space around it."""
    return text


EXTRACTORS: dict[str, Extractor] = {"unchanged": unchanged}


def ocrbench_v2(parsed: str, document: Document, *, seconds: float = TABLE_SECONDS) -> float:
    """OCRBench v2: the score of the question's type: ANLS, F1, IoU, TEDS, BLEU with METEOR, and others.
    Pages need nltk, jieba and WordNet (extra `ocr`). An answer that takes longer than `seconds` has no score and is
    counted.
    """
    columns = {name: document.extra.get(name, "") for name in ("eval", "bbox", "content")}
    asked = {"kind": document.category or "", "text": document.question, "reference": document.answers[0]}
    return PROCESS.value(reading.score, seconds=seconds, answer=parsed, columns=columns, **asked)


def ccocr_text(parsed: str, document: Document) -> float:
    """CC-OCR: F1 of the words, or of the characters by the sub-set in `split`, whatever their order."""
    split, group = document.extra.get("split", ""), document.category or ""
    return best(
        lambda text, reference: ccocr.text_f1(text, reference, split=split, group=group), parsed, document.answers
    )


def ccocr_fields_f1(parsed: str, document: Document) -> float:
    """CC-OCR, key information: F1 of the fields of a JSON answer."""
    return ccocr_fields.f1(parsed, document.answers[0])


def ccocr_fields_tree(parsed: str, document: Document, *, seconds: float = TABLE_SECONDS) -> float:
    """CC-OCR, key information: 1 less the edits of the tree of fields (nTED).
    An answer that takes longer than `seconds` has no score and is counted.
    """
    return PROCESS.value(ccocr_fields.tree_similarity, seconds=seconds, answer=parsed, reference=document.answers[0])


def ccocr_document(parsed: str, document: Document, *, seconds: float = TABLE_SECONDS) -> float:
    """CC-OCR, documents: TEDS of a table, edit similarity of a page, a formula or a molecule, without spaces.
    A table that takes longer than `seconds` has no score and is counted.
    """
    kind = document.extra.get(_KIND, "")
    answer, reference = ccocr_documents.texts(parsed, document.answers[0], kind)
    if kind == ccocr_documents.TABLE:
        return PROCESS.value(teds, seconds=seconds, answer=answer, reference=reference)
    return ccocr_documents.similarity(answer, reference)


METRICS: dict[str, Metric] = {
    "ocrbench_v2": ocrbench_v2,
    "ccocr_text": ccocr_text,
    "ccocr_fields_f1": ccocr_fields_f1,
    "ccocr_fields_tree": ccocr_fields_tree,
    "ccocr_document": ccocr_document,
}


def ocrbench_v2_capabilities(samples: Samples) -> Summed:
    """OCRBench v2: the mean over the capabilities of the mean of their answers; that of every type is given beside it.

    As at the source, a translation of nothing and a table that is not asked for do not count.
    """
    counted = [float(not _ignored(sample.document)) for sample in samples]
    types = [sample.document.category or "" for sample in samples]
    capabilities = [reading.TYPES[name][0] if name in reading.TYPES else "" for name in types]
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


def _fields_of(sample: Scored) -> float:
    """Half the fields of an answer and its reference; of a faulty reference none, as its answers have no score."""
    try:
        return ccocr_fields.field_counts(sample.parsed, sample.document.answers[0])[1]
    except ValueError:
        return 0.0


def ccocr_fields_sets(samples: Samples, *, column: str = "split") -> Summed:
    """CC-OCR, key information: the mean over the sub-sets in `column` of F1 over the fields of all their pictures."""
    names = [name for (name,) in values_of(samples, (column,), named="ccocr_fields_sets")]
    members: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        members[name].append(number)
    halves = [_fields_of(sample) for sample in samples]
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


AGGREGATIONS: dict[str, Callable[..., Summed]] = {
    "ocrbench_v2_capabilities": ocrbench_v2_capabilities,
    "ccocr_fields_sets": ccocr_fields_sets,
}
