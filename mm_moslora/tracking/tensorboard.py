"""TensorBoard: event files in `RUN/tensorboard`. Look at them with `tensorboard --logdir RUN`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.tracking.base import Sample, namespaced
from mm_moslora.tracking.pictures import thumbnail

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Writes scalars, sample tables and pictures as TensorBoard events."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None:
        """See `Tracker.start`. Readers drop the events from `purge_step` on, so nothing shows twice."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(  # type: ignore[no-untyped-call]
            log_dir=str(run_folder / FOLDER), purge_step=0 if resume_step is None else resume_step + 1
        )
        if resume_step is None:
            self._writer.add_text("recipe", _preformatted(json.dumps(config, indent=2, default=str)), 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        for name, value in metrics.items():
            self._writer.add_scalar(namespaced(name), float(value), step)

    def log_samples(self, title: str, samples: Sequence[Sample], step: int) -> None:
        """See `Tracker.log_samples`."""
        import numpy as np

        rows = ["| question | expected | prediction | correct |", "|---|---|---|---|"]
        for index, sample in enumerate(samples):
            correct = "" if sample.correct is None else ("yes" if sample.correct else "no")
            cells = (sample.question, sample.expected, sample.prediction, correct)
            rows.append("| " + " | ".join(_cell(text) for text in cells) + " |")
            if sample.image is not None:
                pixels = np.asarray(thumbnail(sample.image))
                self._writer.add_image(f"{title}/{index}", pixels, step, dataformats="HWC")
        self._writer.add_text(title, "\n".join(rows), step)

    def log_folder(self, title: str, folder: Path, *, aliases: Sequence[str]) -> None:
        """Nothing: TensorBoard keeps no files."""

    def finish(self, *, ok: bool) -> None:
        """See `Tracker.finish`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _preformatted(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
