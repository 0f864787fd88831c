"""Selects documents of a data set, with all that an aggregation counts together with one of them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import accumulate

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora_eval.scoring.score_aggregation import documents_together
from mm_moslora_eval.sources.document import DataSet, Document


def selected(
    data: DataSet, *, aggregation: str, samples: Sequence[str], limit: int | None, stratify: str | None, seed: int
) -> tuple[Document, ...]:
    """See `EvaluationSettings.select`."""
    documents = data.documents
    groups = {one.id: group for one, group in zip(documents, documents_together(aggregation, documents), strict=True)}
    if samples:
        missing = set(samples) - {document.id for document in documents}
        if missing:
            raise EvalError(f"{data.path} has no document {', '.join(sorted(missing)[:5])}.")
        chosen = {groups[name] for name in samples}
        documents = tuple(document for document in documents if groups[document.id] in chosen)
    if limit is None:
        return documents
    sizes = Counter(groups[document.id] for document in documents)
    if stratify is not None:
        firsts: dict[Hashable, Document] = {}
        for document in documents:
            firsts.setdefault(groups[document.id], document)
        count = max(1, limit * len(sizes) // len(documents))
        drawn = _stratified(tuple(firsts.values()), stratify, count, seed=seed)
        chosen = {groups[document.id] for document in drawn}
    else:
        chosen = {group for group, total in zip(sizes, accumulate(sizes.values()), strict=True) if total <= limit}
        chosen = chosen or {groups[documents[0].id]}
    return tuple(document for document in documents if groups[document.id] in chosen)


def _stratified(documents: Sequence[Document], column: str, count: int, *, seed: int) -> tuple[Document, ...]:
    """So many documents, in their order, with the shares of the values of a column (largest remainders).

    The documents of a smaller sample are among those of a larger one, as far as the shares allow.
    """
    strata: dict[str, list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        strata[document.column(column)].append(index)
    if without := strata.get(""):
        known = dict.fromkeys(["category", *(key for document in documents for key in document.extra)])
        raise EvalError(
            f"stratify is {column!r}, and {len(without)} of {len(documents)} documents have nothing in this column. "
            f"Columns: {', '.join(known)}."
        )
    share = min(1.0, count / len(documents))
    quotas = {name: int(share * len(members)) for name, members in strata.items()}
    left = min(count, len(documents)) - sum(quotas.values())
    for name in sorted(strata, key=lambda name: (quotas[name] - share * len(strata[name]), name))[:left]:
        quotas[name] += 1
    chosen: set[int] = set()
    for name, members in strata.items():
        order = random.Random(sha256_of_values([seed, column, name])).sample(members, len(members))
        chosen |= {*order[: quotas[name]]}
    return tuple(document for index, document in enumerate(documents) if index in chosen)
