"""A sample of documents with the shares of the whole data set."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora_eval.sources.document import Document


def stratified(documents: Sequence[Document], column: str, count: int, *, seed: int) -> tuple[Document, ...]:
    """So many documents, in their order, with the shares of the values of a column (largest remainders).

    The documents of a smaller sample are among those of a larger one, as far as the shares allow.

    Raises:
        EvalError: documents without a value in the column.
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
