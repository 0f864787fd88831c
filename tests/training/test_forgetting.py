"""What a run forgets: measured at both ends, with paired intervals, and by default only where it costs little."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mm_moslora_eval.run.in_training import forgotten, measure
from trials import colour_task, hexed, with_train

from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.reporting.run_page import build_report
from mm_moslora.training.forgetting import FORGETTING, START, Forgetting, general_texts
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ConfigError, DataError, TrainingError


def with_validate(recipe: Recipe, **changes) -> Recipe:
    recipe = with_train(recipe, rehearsal=False)
    return replace(recipe, validate=replace(recipe.validate, **changes))


def rows_of(run: Path) -> list[dict[str, object]]:
    return json.loads((run / FORGETTING).read_text())


def test_a_run_tells_what_it_forgot(recipe: Recipe, records: Path, tmp_path: Path) -> None:
    """Also one that was stopped between; the measurement changes no loss."""
    task = colour_task(records.parent / "images", tmp_path)
    recipe = replace(recipe, optim=replace(recipe.optim, lr=0.1))
    straight = with_validate(with_train(recipe, output=str(tmp_path / "straight")), forgetting="never")
    train(straight, forgotten=forgotten)
    assert not (tmp_path / "straight" / START).exists()
    recipe = with_validate(recipe, forgetting="always", tasks=[task], task_limit=6)
    train(recipe, measure=measure, forgotten=forgotten, stop_at=2)
    assert train(recipe, measure=measure, forgotten=forgotten).finished
    run = Path(recipe.train.output)
    assert hexed(run) == hexed(tmp_path / "straight")
    text, colours, *_ = rows_of(run)
    assert text["what"] == "general text"
    assert text["difference"]["groups"] == 24
    assert text["difference"]["low"] < text["difference"]["value"] < text["difference"]["high"]
    assert text["difference"]["value"] == pytest.approx(text["after"] - text["before"], rel=1e-6)
    assert abs(text["difference"]["value"]) > 1e-3, "a tiny model at a large rate changes"
    assert colours["what"].startswith("colours@")
    page = build_report(run, tmp_path / "report.html").read_text()
    assert "general text: " in page
    assert "log-likelihood per token" in page
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("forgetting/general_text" in line for line in metrics)


def test_a_text_that_was_changed_in_between_is_not_compared(recipe: Recipe, tmp_path: Path, caplog) -> None:
    own = tmp_path / "own.txt"
    own.write_text("The first text.\n\nThe second text.")
    recipe = with_validate(recipe, forgetting="always", general_text=str(own))
    train(recipe, forgotten=forgotten, stop_at=1)
    own.write_text("Another text.\n\nThe second text.")
    assert train(recipe, forgotten=forgotten).finished
    assert rows_of(Path(recipe.train.output)) == []
    assert "validate.general_text was changed since the start of the run" in caplog.text
    (own.parent / "odd.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        train(
            with_validate(with_train(recipe, output=str(tmp_path / "odd")), general_text=str(own.parent / "odd.txt")),
            forgotten=forgotten,
        )


def test_by_default_only_what_takes_less_than_a_tenth(recipe: Recipe, caplog, monkeypatch) -> None:
    caplog.set_level("INFO", logger="mm_moslora")
    seconds: Iterator[float] = iter([1.0, 0.5, 1.0, 0.001])  # a micro-batch and a text, of the second run again
    monkeypatch.setattr(Forgetting, "_seconds_of", lambda self, batch: next(seconds))
    short = with_validate(recipe)
    train(with_train(short, steps=2), forgotten=forgotten)
    run = Path(short.train.output)
    assert "Forgetting is not measured on general text: it takes (12.0 s) more than a tenth of the run" in caplog.text
    assert not (run / START).exists()
    assert not (run / FORGETTING).exists()
    other = with_train(short, steps=2, output=str(run.with_name("other")))
    train(other, forgotten=forgotten)
    assert len(json.loads((run.with_name("other") / START).read_text())["text"]) == 24


def test_tasks_that_take_too_long_are_left_out(recipe: Recipe, records: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Forgetting, "_seconds_of", lambda self, batch: 0.001)
    monkeypatch.setattr(Forgetting, "_least_seconds", lambda self, tokens: 10 * (0.024 + 1e-6))
    recipe = with_validate(recipe, tasks=[colour_task(records.parent / "images", tmp_path)], task_limit=6)
    train(with_train(recipe, steps=1), measure=measure, forgotten=forgotten)
    assert [row["what"] for row in rows_of(Path(recipe.train.output))] == ["general text"]


def test_an_own_text_may_be_a_file_or_records(recipe: Recipe, tmp_path: Path) -> None:
    class Made:
        """The attributes of a run that the text needs."""

        def __init__(self, path: Path) -> None:
            self.recipe, self.assembly = with_validate(recipe, general_text=str(path)), assembly

    from mm_moslora.models.assembly import load_parts

    assembly = load_parts(recipe.model)
    (tmp_path / "own.txt").write_text("One.\n\n\nTwo\nlines.\n")
    assert [len(batch.ids) for batch in general_texts(Made(tmp_path / "own.txt"))] == [1, 1]
    talk = {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]}
    lines = [{"text": "One."}, talk, talk | {"image": "a.png"}, {"text": ""}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(general_texts(Made(tmp_path / "own.jsonl"))) == 2
    with pytest.raises(TrainingError, match="general_text is 'nowhere', and nothing is there"):
        train(with_validate(recipe, general_text="nowhere"))


def test_replayed_data_has_its_share_of_the_records() -> None:
    from mm_moslora.data.epoch_order import repeats_of

    repeats = repeats_of([300, 50, 40], [1, 2, 0.2], [False, False, True])
    assert repeats[:2] == [1, 2]
    assert 40 * repeats[2] == pytest.approx(0.2 * (300 + 100 + 40 * repeats[2]))
    parts = repeats_of([300, 50, 40], [3, 1, 0.2], [False, False, True], mixing="parts", records=1000)
    assert [round(n * size) for n, size in zip(parts, [300, 50, 40], strict=True)] == [600, 200, 200]
    with pytest.raises(ConfigError, match=r"replay is set and weight is 1\.0, expected its share"):
        SourceConfig(path="x", replay=True)


def test_not_everything_can_be_replayed(recipe: Recipe) -> None:
    old = SourceConfig(path="x", replay=True, weight=0.5)
    for sources in ([old], [*recipe.data.train, old, old]):
        with pytest.raises(ConfigError, match="Leave at least one source without replay"):
            replace(recipe.data, train=sources)
