"""DocVQA: what its server takes."""

from __future__ import annotations

from mm_moslora_eval.scoring.submission_forms import Submission, as_json, number

SUBMISSIONS = {
    "docvqa": Submission(
        write=lambda rows: as_json([{"questionId": number(row["id"]), "answer": row["text"]} for row in rows])
    )
}
"""The JSON of its server."""
