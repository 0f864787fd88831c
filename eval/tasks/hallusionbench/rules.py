"""HallusionBench: the shares of right questions, figures and questions over all figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from mm_moslora_eval.scoring.estimates import mean_of, value_of
from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.parts.grouped_scores import all_right
from mm_moslora_eval.scoring.rule_forms import AggregationFacts, of_text
from mm_moslora_eval.scoring.scored_sample import Samples, Scored, Summed


def hallusionbench_lmms_eval(text: str) -> str:
    """lmms-eval for HallusionBench without its judge: `yes` anywhere in the answer is a yes, everything else a no."""
    return "yes" if "yes" in text.lower() else "no"


def _hallusion_columns(sample: Scored) -> dict[str, str]:
    """Columns of the original data, or the parts of VLMEvalKit's index (`VD_figure_v_set_figure_question`)."""
    extra = sample.document.extra
    parts = sample.document.id.split("_")
    from_id = dict(zip(("set_id", "figure_id", "question_id"), parts[-3:], strict=False)) if len(parts) >= 6 else {}
    numbers = {key: extra.get(key, from_id.get(key, "")) for key in ("set_id", "figure_id", "question_id")}
    subcategory = extra.get("subcategory", extra.get("l2-category", ""))
    return {"category": sample.document.category or "", "subcategory": subcategory, **numbers}


def hallusionbench(samples: Samples) -> Summed:
    """HallusionBench's aAcc, with fAcc and qAcc."""
    return _hallusion(samples, ("category", "subcategory"))


def hallusionbench_vlmevalkit(samples: Samples) -> Summed:
    """The same with VLMEvalKit's grouping, by sub-category only; with the three shares of every category."""
    members: dict[str, list[Scored]] = defaultdict(list)
    for sample in samples:
        columns = _hallusion_columns(sample)
        for name in dict.fromkeys((columns["category"], columns["subcategory"])):
            members[name].append(sample)
    whole = _hallusion(samples, ("subcategory",))
    by_group = {name: _hallusion(some, ("subcategory",)).metrics for name, some in sorted(members.items()) if name}
    by_name = {f"{number}_{name}": share for name, item in by_group.items() for number, share in item.items()}
    return replace(whole, metrics=whole.metrics | by_name)


def _hallusion(samples: Samples, within: Sequence[str]) -> Summed:
    """The shares of right questions (aAcc), figures (fAcc) and questions over all figures (qAcc).

    `within` are the columns that distinguish sets of the same number. The benchmark's own script and lmms-eval use
    category and sub-category. VLMEvalKit uses only the sub-category, so `VD` and `VS` share the sets of one.
    """
    right = [sample.score == 1.0 for sample in samples]
    columns = [_hallusion_columns(sample) for sample in samples]
    sets = [tuple(values[name] for name in (*within, "set_id")) for values in columns]
    ratios = [mean_of([float(hit) for hit in right])]
    metrics = {"aAcc": value_of(ratios)}
    for name, part in (("fAcc", "figure_id"), ("qAcc", "question_id")):
        keys = [(*one, values[part]) for one, values in zip(sets, columns, strict=True)]
        metrics[name] = value_of([all_right(keys, right)])
    return Summed(ratios=ratios, metrics=metrics, together=sets)


EXTRACTORS: dict[str, Extractor] = {"hallusionbench_lmms_eval": of_text(hallusionbench_lmms_eval)}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {
    "hallusionbench": hallusionbench,
    "hallusionbench_vlmevalkit": hallusionbench_vlmevalkit,
}
FACTS = dict.fromkeys(AGGREGATIONS, AggregationFacts(one_answer=True))
