"""Wherever a score stands it says that many of its answers could not be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.eval_commands import table
from mm_moslora_eval.protocol.model_interface import Answer
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.report.evaluation_page import write_report
from mm_moslora_eval.report.run_evidence import NamedResult, row_of
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.task_runner import EvaluationSettings

from mm_moslora.cli.evaluation.eval_result_verbs import eval_compare, eval_table
from mm_moslora.reporting.run_rows import read_evaluation_row
from mm_moslora.reporting.summary_text import verdict
from tests.eval.eval_fake import FakeModel


class Rambling(FakeModel):
    """Names no letter in its first answers."""

    def __init__(self, unread: int) -> None:
        super().__init__(fingerprint=f"f{unread}")
        self.unread = unread

    def _answer(self, request: Any) -> Answer:
        text = "It has four legs and a long tail" if int(request.id) < self.unread else "B"
        return Answer(text=text, tokens=1, finish_reason="stop")


@pytest.mark.parametrize(("unread", "said"), [(2, False), (3, True), (20, True)])
def test_every_place_of_a_score_says_that_many_answers_were_not_read(
    unread: int, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(n), "question": f"q{n}", "options": ["x", "y"], "answer": "AB"[n % 2]} for n in range(20)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(
        "name: t\nsource: {kind: llava, path: q.jsonl}\nextraction: letter\nmetric: equal\n"
    )
    task = get_task(str(tmp_path / "t.yaml"))
    settings = EvaluationSettings(rank=0, world_size=1)
    found = {}
    for name, model in (("good", Rambling(0)), ("bad", Rambling(unread))):
        (found[name],) = evaluate(model, task, tmp_path / name, modes=("own",), baselines=(), settings=settings)
    good, bad = tmp_path / "good", tmp_path / "bad"
    eval_table(good, bad, html=tmp_path / "table.html")
    both = capsys.readouterr().out
    eval_compare(str(good), str(bad), html=tmp_path / "pair.html")
    places = {
        "table": table([found["bad"]]), "results": (bad / "results.json").read_text(),
        "page": write_report(bad).read_text(), "models": both, "models page": (tmp_path / "table.html").read_text(),
        "comparison": capsys.readouterr().out, "comparison page": (tmp_path / "pair.html").read_text(),
    }  # fmt: skip
    for name, label in (("tuned", "After tuning"), ("untuned", "Before tuning")):
        other = {"tuned": "untuned", "untuned": "tuned"}[name]
        written = [
            read_evaluation_row(row_of(NamedResult(name=one, label=label, result=result, less=None)), [])
            for one, result in ((name, found["bad"]), (other, found["good"]))
        ]
        conclusion = verdict("t", [row for row in written if row is not None])
        assert conclusion is not None
        places[name] = " ".join(conclusion.sentences)
    words = ("could not be read and count as wrong", f"None of {unread} answers could be read")
    assert {name: any(word in text for word in words) for name, text in places.items()} == dict.fromkeys(places, said)
