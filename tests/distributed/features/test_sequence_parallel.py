"""Ranks that compute every row together: the numbers of one rank that computes it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import make_records
from trials import full, make_recipe, metrics, with_train, write

from mm_moslora.batch import Batch, Example
from mm_moslora.models.memory_efficient.row_share import RowShare

KEYS = ("loss", "grad_norm", "tokens_seen", "images", "weight_norm/adapter", "momentum_norm/mixer")


@pytest.mark.parametrize("of", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 5, 8, 13])
def test_the_parts_of_a_row_are_the_row_and_every_target_is_in_one(of: int, tokens: int) -> None:
    ids = torch.arange(1, tokens + 1)
    batch = Batch.from_examples([Example(id="", input_ids=ids, supervised=ids % 2 == 0)])
    shares = [RowShare(index=index, of=of) for index in range(of)]
    row = torch.cat([share.cut(ids[None], batch) for share in shares], dim=1)[0]
    padding = shares[0].padding(batch)
    assert row.tolist() == [*ids.tolist(), *[0] * padding]
    assert padding < of
    assert torch.cat([batch.targets[share.targets(batch)] for share in shares]).tolist() == batch.targets.tolist()
    for share in shares:
        places = batch.target_positions[share.targets(batch)] - share.index * share.width(batch)
        assert all(0 <= place < share.width(batch) for place in places.tolist())


@pytest.mark.slow
def test_two_ranks_share_every_row_and_give_the_numbers_of_one(parts, ranks, tmp_path):
    """Rows of odd lengths, packed ones, rows without pictures, parts without a supervised token, and validations."""
    mixed = parts | {"records": make_records(tmp_path / "records", 24, text_only_every=3)}

    text = parts | {"records": make_records(tmp_path / "text-records", 6, text_only_every=1)}
    few = make_recipe(parts | {"records": make_records(tmp_path / "few", 4)}, tmp_path, "none").data.train

    def recipe(name, zero, *, records=mixed, **train):
        made = make_recipe(records, tmp_path / name, zero, micro_batch=1, global_batch=3, validate_every=4, **train)
        return replace(made, data=replace(made.data, validation=few if records is mixed else made.data.train))

    together = recipe("zero2", "zero2", sequence_parallel=2, rehearsal=True)
    runs = {
        "zero2": together,
        "zero3": recipe("zero3", "zero3", sequence_parallel=2, gradient_checkpointing=True, activation_offload=True),
        "packed": replace(recipe("packed", "zero2", sequence_parallel=2), data=replace(together.data, pack_tokens=300)),
        "stock": replace(
            recipe("stock", "zero0", sequence_parallel=2), model=replace(together.model, lean_layers=False)
        ),
        "text": full(
            replace(
                recipe("text", "zero1", records=text, sequence_parallel=2), model=replace(together.model, vision=None)
            )
        ),
    }
    alone = {
        name: with_train(
            run, output=str(tmp_path / f"{name}-alone"), zero="none", sequence_parallel=1, gradient_checkpointing=False,
            activation_offload=False, rehearsal=False,
        )
        for name, run in runs.items()
    }  # fmt: skip
    ranks.run([write(run) for run in runs.values()])
    ranks.run([write(run) for run in alone.values()], ranks=1)
    for name in runs:
        found, expected = (metrics(tmp_path / folder) for folder in (name, f"{name}-alone"))
        assert len(found) == 4
        for key in KEYS if name != "text" else KEYS[:3]:
            assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5), (
                name,
                key,
            )
