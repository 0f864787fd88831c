"""TensorBoard: event files in `RUN/tensorboard`. View them with `tensorboard --logdir RUN`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.tracking.tracker import Ending, SampleAnswer, Tracker, headline, namespaced

FOLDER = "tensorboard"


class TensorBoardTracker(Tracker):
    """Writes scalars, sample tables and pictures as TensorBoard events."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None:
        """See `Tracker.start`. Readers drop the events from `purge_step` on, so no event shows twice."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(  # type: ignore[no-untyped-call]
            log_dir=str(run_folder / FOLDER), purge_step=0 if resume_step is None else resume_step + 1
        )
        if resume_step is None:
            self._writer.add_text("recipe", textwrap.indent(json.dumps(config, indent=2, default=str), "    "), 0)

    def reopen(self, config: Mapping[str, Any], run_folder: Path) -> None:
        """See `Tracker.reopen`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run_folder / FOLDER))  # type: ignore[no-untyped-call]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        for name, value in metrics.items():
            self._writer.add_scalar(namespaced(name), float(value), step)

    def log_samples(self, title: str, samples: Sequence[SampleAnswer], step: int) -> None:
        """See `Tracker.log_samples`."""
        import numpy as np

        rows = ["| question | expected | prediction | correct |", "|---|---|---|---|"]
        for index, sample in enumerate(samples):
            correct = "" if sample.correct is None else ("yes" if sample.correct else "no")
            cells = (sample.question, sample.expected, sample.prediction, correct)
            rows.append("| " + " | ".join(_cell(text) for text in cells) + " |")
            small = sample.small()
            if small is not None:
                self._writer.add_image(f"{title}/{index}", np.asarray(small), step, dataformats="HWC")
        self._writer.add_text(title, "\n".join(rows), step)

    def log_evaluation(self, rows: Sequence[Mapping[str, Any]], *, adapter: str | None, step: int) -> None:
        """See `Tracker.log_evaluation`."""
        cells = ["| task | system | n | mean | low | high |", "|---|---|---|---|---|---|"]
        for row in rows:
            texts = [str(row.get(key, "")) for key in ("task", "label", "n", "mean", "low", "high")]
            cells.append("| " + " | ".join(_cell(text) for text in texts) + " |")
        self._writer.add_text("evaluation", "\n".join([*cells, "", f"adapter sha256 {adapter}"]), step)
        for name, score in headline(rows).items():
            self._writer.add_scalar(name, score, step)

    def alert(self, title: str, text: str) -> None:
        """See `Tracker.alert`."""
        self._writer.add_text("alerts", f"**{_cell(title)}** {_cell(text)}", 0)  # an alert has no step

    def finish(self, *, ending: Ending = "finished") -> None:
        """See `Tracker.finish`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
