"""One rank of an evaluation with the fake model, for tests that kill it: DATA OUTPUT LOG DELAY."""

from __future__ import annotations

import sys
from pathlib import Path

from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.task_runner import EvaluationSettings

from tests.eval.eval_fake import FakeModel

if __name__ == "__main__":
    data, output, log, delay = sys.argv[1:5]
    evaluate(
        FakeModel(log=Path(log), delay=float(delay), fail_on=("q5",)),
        get_task(f"llava:{data}"),
        Path(output),
        modes=("own", "wrong"),
        settings=EvaluationSettings(batch_size=3),
    )
