"""Results of a run as the model-index of a model card on the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.files import replace_text
from mm_moslora.utils.folder_marks import output_file
from mm_moslora.utils.redaction import redact_text
from mm_moslora_eval.report.evaluation_page import names_of
from mm_moslora_eval.run.result_file import read_results
from mm_moslora_eval.run.run_lock import RUN
from mm_moslora_eval.run.scored_subsets import read_json
from mm_moslora_eval.scoring.task_result import RULES, TaskResult, strict_json

_TASK_TYPE = "image-text-to-text"
_DECIDES = (
    "prompt", "decoding", *RULES, "grading", "changed", "code", "selection", "asked_as", "asked_to_think", "seed",
    "video", "video_frames",
)  # fmt: skip
"""What `TaskResult.about` knows of how answers were asked for and scored; the card repeats it whole."""


def write_model_index(run: Path, out: Path) -> int:
    """Write the results of a run with its own pictures; gives how many have no score and are left out."""
    results = [result for result in read_results(run) if result.mode == "own"]
    scored = [result for result in results if result.scored]
    if not scored:
        raise EvalError(f"{run} holds no scored results of own pictures; expected a run folder with a results.json.")
    model = redact_text(model_of(run), keep_hashes=True)
    output_file(out).parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, _model_index(model, scored))
    return len(results) - len(scored)


def model_of(run: Path) -> str:
    """The name of a run's model; the folder's name where its record is missing or damaged."""
    try:
        return str(read_json(run / RUN)["model"]["name"])
    except (EvalError, KeyError, TypeError):
        return run.name


def _model_index(model: str, results: Sequence[TaskResult]) -> str:
    """The front matter of a model card; several protocols of one set stand under it as metrics."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    rows = []
    for name, result in zip(names_of(results), results, strict=True):
        about, counts = result.about, result.counts
        data, selection = about.get("data", {}), about.get("selection", {})
        path = str(data.get("path", ""))
        hub_id = path if path.count("/") == 1 and not Path(path).suffix else result.task
        details = {
            "protocol": result.protocol, "version": result.version, "stderr": result.stderr, "low": result.low,
            "high": result.high, "documents": result.n, "failed": counts.failed,
            "not_inferable": counts.not_inferable, "ungraded": counts.ungraded, "judge": _judge(about),
            **{name: about[name] for name in _DECIDES if name in about},
        }  # fmt: skip
        part = selection.get("name", "all")
        rows.append(
            EvalResult(
                task_type=_TASK_TYPE, task_name=name, dataset_type=hub_id,
                dataset_name=about.get("title") or result.task,
                dataset_config=None if part == "all" else f"{part} of {selection.get('of')}",
                dataset_revision=data.get("revision"), metric_type=str(about.get("metric", "score")),
                metric_name=_measure(result),
                metric_value=result.score, metric_args=strict_json({k: v for k, v in details.items() if v is not None}),
            )
        )  # fmt: skip
    index = eval_results_to_model_index(Path(model).name or model, rows)
    return yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)


def _measure(result: TaskResult) -> str:
    """The name of a score, with what makes it another one than the protocol's greedy answers give."""
    about = result.about
    temperature, samples = (about.get("decoding", {}).get(*usual) for usual in (("temperature", 0), ("samples", 1)))
    parts = [
        result.protocol, temperature and f"temperature {temperature}",
        samples > 1 and f"{about.get('over_samples', 'mean')} over {samples} samples",
        about.get("changed") and f"changed: {'; '.join(about['changed'])}",
    ]  # fmt: skip
    name = f"{about.get('aggregation', 'mean')} of {about.get('metric', 'score')}"
    return f"{name} ({', '.join(str(part) for part in parts if part)})"


def _judge(about: Mapping[str, Any]) -> str | None:
    judge = about.get("judge")
    return (
        None if judge is None or "wording" not in judge else f"{judge['model']}, prompt {judge['prompt_sha256'][:12]}"
    )
