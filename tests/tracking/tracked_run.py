"""What a short run gives its trackers."""

from __future__ import annotations

from pathlib import Path

from mm_moslora.tracking import SampleAnswer, Trackers
from mm_moslora.tracking.tracker import adapter_digest

SCORES = [
    {"name": "tuned", "label": "tuned", "task": "shapes", "n": 50, "mean": 0.8, "low": 0.7, "high": 0.9},
    {"name": "blind", "label": "blind", "task": "shapes", "n": 50, "mean": 0.3, "low": 0.2, "high": 0.4},
]
SECRET = "hf_" + "Q7x" * 10


def everything(
    trackers: Trackers, run: Path, sample: SampleAnswer, adapter: Path, *, resume_step: int | None = None
) -> None:
    """A short life of a run, with a secret where it might slip through."""
    run.mkdir(exist_ok=True)
    trackers.start({"optim": {"lr": 1e-4}, "note": SECRET}, run, resume_step=resume_step)
    for step in range((resume_step or 0) + 1, (resume_step or 0) + 3):
        trackers.log({"loss": 1.0 / step, "lr/mixer": 1e-4, "mixer/moved": 0.3}, step)
    trackers.log_samples("answers", [sample], 2)
    trackers.log_folder("adapter", adapter)
    trackers.log_evaluation(SCORES, adapter=adapter_digest(adapter), step=2)
    trackers.alert("Save failed", f"Step 2: {SECRET}")
    trackers.finish()
