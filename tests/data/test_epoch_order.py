"""The order of training as properties: steps, mixture of sources, packed rows; and LLaVA's own order."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_moslora.data.epoch_order import MicroBatchLimit, deal, fill_rate, pack, plan_epoch, records_of_epoch

ORDERS = ["grouped", "random", "sequential"]


def lists_of(items, most: int, *, least: int = 1):
    """Lists of any length alike; those of `st.lists` alone have about six items."""
    return st.integers(least, most).flatmap(lambda size: st.lists(items, min_size=size, max_size=size))


sets = lists_of(st.tuples(st.integers(1, 4000), st.booleans()), 150)


def plan(examples, *, seed=0, epoch=0, global_batch=8, order="grouped"):
    return plan_epoch(
        [length for length, _ in examples], [image for _, image in examples], seed=seed, epoch=epoch,
        global_batch=global_batch, order=order,
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(sets, st.sampled_from(ORDERS), st.integers(1, 40), st.integers(1, 8), st.integers(1, 5), st.integers(0, 3))
def test_every_example_once_for_every_world_and_micro_batch(examples, order, global_batch, world, micro, epoch):
    steps = plan(examples, epoch=epoch, global_batch=global_batch, order=order)
    assert sorted(number for step in steps for number in step) == list(range(len(examples)))
    assert all(len(step) == global_batch for step in steps[:-1])
    lengths = [length for length, _ in examples]
    for step in steps:
        ranks = deal(step, lengths, world_size=world, limit=MicroBatchLimit(examples=micro))
        assert len(ranks) == world
        assert len({len(rank) for rank in ranks}) == 1, "ranks must take the same number of micro-batches"
        assert sorted(number for rank in ranks for batch in rank for number in batch) == sorted(step)
        assert all(len(batch) <= micro for rank in ranks for batch in rank)


@settings(max_examples=60, deadline=None)
@given(sets, st.sampled_from(ORDERS), st.integers(0, 5), st.integers(0, 3))
def test_the_order_depends_on_seed_and_epoch_alone(examples, order, seed, epoch):
    first = plan(examples, seed=seed, epoch=epoch, order=order)
    random.seed(99)
    assert plan(examples, seed=seed, epoch=epoch, order=order) == first


@pytest.mark.parametrize("order", ["grouped", "random"])
def test_seeds_and_epochs_differ(order):
    examples = [(10 + number, number % 3 > 0) for number in range(64)]
    assert plan(examples, order=order) != plan(examples, order=order, epoch=1)
    assert plan(examples, order=order) != plan(examples, order=order, seed=1)


@pytest.mark.parametrize("images", [[True], [False], [True, False], [True, True, True, False]])
def test_grouped_steps_are_of_one_modality_except_the_leftovers(images):
    examples = [(10, images[number % len(images)]) for number in range(100)]
    steps = plan(examples, global_batch=8)
    mixed = [step for step in steps if len({examples[number][1] for number in step}) > 1]
    assert len(mixed) <= 2
    assert len(steps) == 13


def test_grouped_steps_hold_similar_lengths():
    rng = random.Random(0)
    examples = [(rng.randint(10, 2000), True) for _ in range(512)]

    def spread(order):
        steps = plan(examples, global_batch=16, order=order)
        return sum(max(examples[i][0] for i in step) - min(examples[i][0] for i in step) for step in steps)

    assert spread("grouped") < 0.25 * spread("random")


class TestMixture:
    @settings(max_examples=80, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 30), st.floats(0.05, 3.0)), min_size=1, max_size=4),
        st.integers(0, 4),
        st.integers(0, 9),
    )
    def test_weights_say_how_often_a_record_is_seen(self, sources, seed, epoch):
        members, start = [], 0
        for size, _ in sources:
            members.append(range(start, start + size))
            start += size
        weights = [weight for _, weight in sources]
        seen = Counter(records_of_epoch(members, weights, seed=seed, epoch=epoch))
        for numbers, weight in zip(members, weights, strict=True):
            counts = [seen[number] for number in numbers]
            assert all(int(weight) <= count <= int(weight) + 1 for count in counts)
            assert any(counts) or not counts
            if counts and weight >= 1:
                assert abs(sum(counts) - weight * len(counts)) <= 0.5

    def test_a_fraction_reaches_every_record_over_the_epochs(self):
        epochs = [records_of_epoch([range(10)], [0.5], seed=0, epoch=epoch) for epoch in range(4)]
        assert [len(epoch) for epoch in epochs] == [5, 5, 5, 5]
        assert sorted(epochs[0] + epochs[1]) == list(range(10))
        assert set(Counter(number for epoch in epochs for number in epoch).values()) == {2}
        assert records_of_epoch([range(3), range(3, 103)], [0.01, 1.0], seed=0, epoch=0)[0] < 3


class TestPacking:
    @settings(max_examples=60, deadline=None)
    @given(lists_of(st.integers(1, 100), 120), st.integers(1, 40))
    def test_every_example_once_and_no_row_overflows(self, lengths, waiting) -> None:
        rows = pack(range(len(lengths)), lengths, tokens=100, waiting=waiting)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        assert all(0 < sum(lengths[number] for number in row) <= 100 for row in rows)

    def test_an_example_seen_twice_is_packed_twice(self) -> None:
        rows = pack([0, 1, 0], [5, 6], tokens=8)
        assert Counter(number for row in rows for number in row) == {0: 2, 1: 1}

    def test_lengths_like_those_of_instruction_data_fill_the_rows(self) -> None:
        rng = random.Random(0)
        lengths = [min(2048, int(rng.lognormvariate(5, 0.75)) + 40 + 576 * (rng.random() < 0.94)) for _ in range(4000)]
        rows = pack(range(4000), lengths, tokens=4096)
        assert fill_rate(rows, lengths, tokens=4096) >= 0.97


@settings(max_examples=150, deadline=None)
@given(
    lists_of(st.integers(1, 2048), 64, least=0), st.integers(1, 8), st.integers(1, 8),
    st.none() | st.integers(2048, 9000), st.booleans(),
)  # fmt: skip
def test_a_micro_batch_has_no_more_tokens_than_allowed(lengths, world, micro, tokens, padded):
    limit = MicroBatchLimit(examples=micro, tokens=tokens, padded=padded)
    ranks = deal(range(len(lengths)), lengths, world_size=world, limit=limit)
    assert sorted(number for rank in ranks for batch in rank for number in batch) == list(range(len(lengths)))
    assert len({len(rank) for rank in ranks}) == 1
    for batch in (batch for rank in ranks for batch in rank):
        sizes = [lengths[number] for number in batch]
        assert len(batch) <= micro
        assert tokens is None or (max(sizes, default=0) * len(sizes) if padded else sum(sizes)) <= tokens
    batches = [batch for rank in ranks for batch in rank]
    assert all(batches) or len(lengths) < len(batches), "an empty one costs a forward pass, and other ranks wait"


def test_a_budget_that_does_not_bind_changes_nothing_and_one_that_does_costs_few_micro_batches():
    rng = random.Random(4)
    lengths = [rng.randint(600, 1100) for _ in range(64)]
    free, wide, tight = (
        deal(range(64), lengths, world_size=4, limit=MicroBatchLimit(examples=8, tokens=tokens))
        for tokens in (None, 8800, 4096)
    )
    assert wide == free
    assert (len(free[0]), len(tight[0])) == (2, 4)  # a rank has about 13,600 tokens


def fewest(lengths: list[int], *, tokens: int, examples: int) -> float:
    """A lower bound of the number of micro-batches: a dual feasible function of the lengths."""

    def weight(length: int, k: int) -> float:
        parts, rest = divmod((k + 1) * length, tokens)
        return parts / k if rest else length / tokens

    bounds = [sum(weight(length, k) for length in lengths) for k in range(1, 12)]
    return max(*bounds, sum(lengths) / tokens, len(lengths) / examples)


LENGTHS = {
    "instruction data": lambda rng: min(2048, int(rng.lognormvariate(5, 0.75)) + 40 + 576 * (rng.random() < 0.94)),
    "texts and pictures": lambda rng: int(rng.gauss(600, 60) if rng.random() < 0.5 else rng.gauss(2000, 15)),
    "all near the budget": lambda rng: rng.randint(1950, 2048),
}


@pytest.mark.parametrize(("tokens", "examples"), [(2048, 16), (4096, 16), (16_384, 16), (30_790, 256)])
@pytest.mark.parametrize("kind", LENGTHS)
def test_thousands_of_examples_are_dealt_fast_into_few_micro_batches_that_end_together(kind, tokens, examples):
    rng, world = random.Random(5), 8
    lengths = [min(2048, LENGTHS[kind](rng)) for _ in range(4096)]
    limit = MicroBatchLimit(examples=examples, tokens=tokens)
    seconds = []
    for _ in range(3):  # a garbage collection may fall into one
        begin = time.process_time()
        ranks = deal(range(4096), lengths, world_size=world, limit=limit)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.05
    least = fewest(lengths, tokens=tokens, examples=examples) / world
    assert len(ranks[0]) <= 1.07 * least + 1
    sizes = [[sum(lengths[number] for number in micro) for micro in rank] for rank in ranks]
    assert max(map(sum, sizes)) <= 1.01 * sum(lengths) / world + 500
    waits = sum(map(max, zip(*sizes, strict=True)))  # every micro-batch takes as long as its slowest rank
    assert waits <= 1.03 * sum(lengths) / world
