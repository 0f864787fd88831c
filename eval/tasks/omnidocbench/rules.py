"""OmniDocBench: what its evaluator takes."""

from __future__ import annotations

from pathlib import PurePath

from mm_moslora_eval.scoring.submission_forms import Submission, archive

SUBMISSIONS = {
    "omnidocbench": Submission(
        write=lambda rows: archive({f"{PurePath(row['id']).stem}.md": row["text"] for row in rows}), suffix="zip"
    )
}
"""The folder of pages that its evaluator reads, one `PICTURE.md` a page, as a ZIP file."""
