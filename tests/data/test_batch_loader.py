"""The batch loader: every record once, the same for every world and any workers, resumable, and it always ends."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import make_records
from waiting import wait_until

from mm_moslora.config import DataConfig
from mm_moslora.data.batch_loader import BatchLoader, largest_batch
from mm_moslora.data.epoch_order import MicroBatchLimit
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, DataError
from tests.data.sets import damage, make_set


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_records(tmp_path_factory.mktemp("loader"), 22)


def loader_for(
    data, *, rank=0, world=1, micro=2, tokens=None, global_batch=4, start=0, seed=0, **options
) -> BatchLoader:
    config = DataConfig(**({"workers": 0, "max_bad_share": 1.0} | options))
    return BatchLoader(
        data, rank=rank, world_size=world, config=config, global_batch=global_batch, seed=seed,
        limit=MicroBatchLimit(examples=micro, tokens=tokens),
        start_step=start,
    )  # fmt: skip


def ids_of(loader, steps: int) -> list[list[list[str]]]:
    with loader:
        return [[list(batch.ids) for batch in step] for step in itertools.islice(loader, steps)]


def flat(steps) -> list[str]:
    return [name for step in steps for batch in step for name in batch if name]


@pytest.mark.parametrize("order", ["grouped", "random", "sequential"])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (5, 1), (8, 1)])
def test_every_record_once_per_epoch_over_all_ranks(path, world, micro, order):
    data = make_set(path)
    loaders = [
        loader_for(data, rank=rank, world=world, micro=micro, global_batch=8, order=order) for rank in range(world)
    ]
    steps = loaders[0].steps_per_epoch
    assert steps == 3
    ranks = [ids_of(loader, steps) for loader in loaders]
    assert sorted(name for rank in ranks for name in flat(rank)) == sorted(f"r{i}" for i in range(22))
    for step in range(steps):
        assert len({len(rank[step]) for rank in ranks}) == 1, "ranks must take the same number of micro-batches"
    reference = [sorted(flat([step])) for step in ids_of(loader_for(data, micro=8, global_batch=8, order=order), steps)]
    assert [sorted(name for rank in ranks for name in flat([rank[step]])) for step in range(steps)] == reference


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_token_budget_cuts_the_same_steps_into_more_micro_batches(path, world, workers):
    data = make_set(path)
    sizes = {f"r{number}": data.lengths[number] for number in range(22)}
    budget = 2 * max(sizes.values())
    ranks = [
        ids_of(loader_for(data, rank=rank, world=world, micro=8, tokens=budget, global_batch=8, workers=workers), 6)
        for rank in range(world)
    ]
    whole = ids_of(loader_for(data, micro=8, global_batch=8), 6)
    assert [sorted(name for rank in ranks for name in flat([rank[step]])) for step in range(6)] == [
        sorted(flat([step])) for step in whole
    ]
    for steps in zip(*ranks, strict=True):
        assert len({len(step) for step in steps}) == 1
        assert max(sum(sizes[name] for name in batch if name) for step in steps for batch in step) <= budget
    assert max(len(step) for step in ranks[0]) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_records_longer_than_their_estimates_stay_within_the_budget(path, tmp_path, workers, monkeypatch):
    """One collective evens out what other ranks cut."""
    data = make_set(path, exact_limit=5)
    for number in data.usable:
        data.lengths[number] = 10
    assert not data.exact
    longest = max(make_set(path).lengths)
    asked = []
    monkeypatch.setattr(distributed, "max_over_ranks", lambda values: asked.append(values) or [values[0] + 1])
    with loader_for(data, micro=8, tokens=2 * longest, global_batch=8, workers=workers) as loader:
        steps = list(itertools.islice(loader, 3))
    assert asked == [[len(step) - 1.0] for step in steps]
    assert asked[0][0] > 2
    assert all(batch.tokens <= 2 * longest for step in steps for batch in step)
    assert all(not step[-1].supervised_tokens and step[-1].tokens == 1 for step in steps)
    assert sorted(name for step in steps for batch in step for name in batch.ids if name) == sorted(
        f"r{number}" for number in range(22)
    )


@pytest.mark.parametrize("start", range(14))
def test_resuming_at_any_step_gives_the_same_continuation(path, start):
    data = make_set(path)
    whole = ids_of(loader_for(data), 14)
    assert ids_of(loader_for(data, start=start), 14 - start) == whole[start:]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(path, workers):
    data = make_set(path)
    with loader_for(data) as plain, loader_for(data, workers=workers) as parallel:
        steps = list(zip(itertools.islice(plain, 8), itertools.islice(parallel, 8), strict=True))
        assert len(steps) == 8
        for alone, together in steps:
            assert alone
            for one, other in zip(alone, together, strict=True):
                assert one.ids == other.ids
                assert torch.equal(one.input_ids, other.input_ids)
                assert (one.pixel_values is None) == (other.pixel_values is None)
                assert one.pixel_values is None or torch.equal(one.pixel_values, other.pixel_values)


@pytest.mark.parametrize("workers", [0, 2])
def test_preparing_ahead_leaves_the_random_state_alone(path, workers):
    data = make_set(path)
    before = torch.get_rng_state()
    ids_of(loader_for(data, workers=workers), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_differ_and_cover_everything(path):
    data = make_set(path)
    steps = ids_of(loader_for(data), 12)
    assert sorted(flat(steps[:6])) == sorted(flat(steps[6:])) == sorted(f"r{i}" for i in range(22))
    assert steps[:6] != steps[6:]


def test_weights_repeat_sources(path, tmp_path):
    other = make_records(tmp_path, 6)
    data = make_set(path, other, weights=[0.5, 2.0])
    loader = loader_for(data)
    assert loader.steps_per_epoch == -(-(11 + 12) // 4)
    assert len(flat(ids_of(loader, loader.steps_per_epoch))) == 23


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_left_out_and_ranks_keep_step(tmp_path, workers):
    path = make_records(tmp_path, 16, text_only_every=0)
    for number in (3, 8):
        damage(tmp_path / "images" / f"{number}.png")
    seen, counts, bad = [], [], []
    for rank in range(2):
        data = make_set(path, quarantine_path=tmp_path / f"quarantine{rank}.jsonl", max_bad_share=0.5)
        loader = loader_for(data, rank=rank, world=2, micro=1, global_batch=4, workers=workers, max_bad_share=0.5)
        steps = ids_of(loader, loader.steps_per_epoch)
        seen += flat(steps)
        counts.append([len(step) for step in steps])
        bad += (tmp_path / f"quarantine{rank}.jsonl").read_text().splitlines()
    assert sorted(seen) == sorted(f"r{i}" for i in range(16) if i not in (3, 8))
    assert counts[0] == counts[1]
    assert len(bad) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_vanishes_ends_the_iteration_before_its_step(tmp_path, workers):
    """A step without its record would be saved, and no start could repeat it."""
    loader = loader_for(make_set(make_records(tmp_path, 16, text_only_every=0)), workers=workers, max_bad_share=0.5)
    (tmp_path / "images" / "9.png").rename(tmp_path / "away.png")
    with pytest.raises(DataError, match=r"9\.png.*was there when the run started"):
        ids_of(loader, loader.steps_per_epoch)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_pictures_stop_the_iteration(tmp_path, workers):
    path = make_records(tmp_path, 12, text_only_every=0)
    for number in range(12):
        damage(tmp_path / "images" / f"{number}.png")
    data = make_set(path, max_bad_share=0.1)
    with loader_for(data, workers=workers) as loader, pytest.raises(DataError, match=r"max_bad_share.*IMAGE_DAMAGED 2"):
        for _ in itertools.islice(loader, 10):
            pass


def test_an_empty_micro_batch_supervises_nothing(path):
    data = make_set(path)
    loaders = [loader_for(data, rank=rank, world=4, micro=1, global_batch=4) for rank in range(4)]
    last = [list(itertools.islice(loader.__enter__(), 6))[-1] for loader in loaders]
    for loader in loaders:
        loader.__exit__(None, None, None)
    empty = [batch for step in last for batch in step if not any(batch.ids)]
    assert len(empty) == 2
    assert all(batch.supervised_tokens == 0 and batch.tokens == 1 and batch.images == 0 for batch in empty)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_ends_cleanly_at_any_moment(path, workers):
    import multiprocessing

    data = make_set(path)
    threads = threading.active_count()
    for steps in (0, 1, 5):
        with loader_for(data, workers=workers) as loader:
            list(itertools.islice(loader, steps))
    with contextlib.suppress(KeyboardInterrupt), loader_for(data, workers=workers) as loader:
        next(iter(loader))
        raise KeyboardInterrupt
    del loader
    wait_until(lambda: threading.active_count() <= threads and not multiprocessing.active_children())


class TestPackedLoader:
    def loader(self, data, *, rank=0, world_size=1, start_step=0, micro_batch=1, tokens=None) -> BatchLoader:
        return BatchLoader(
            data, rank=rank, world_size=world_size, config=data.config, global_batch=4, seed=3,
            limit=MicroBatchLimit(examples=micro_batch, tokens=tokens), start_step=start_step,
        )  # fmt: skip

    def data(self, tmp_path: Path, **options):
        return make_set(make_records(tmp_path, 60), max_length=128, pack_tokens=256, **options)

    def steps(self, loader: BatchLoader, count: int) -> list[list[tuple[str, ...]]]:
        with loader:
            batches = iter(loader)
            return [[batch.ids for batch in next(batches)] for _ in range(count)]

    def test_a_micro_batch_is_a_row_and_an_epoch_holds_every_record_once(self, tmp_path: Path) -> None:
        data = self.data(tmp_path)
        loader = self.loader(data)
        epoch = self.steps(loader, loader.steps_per_epoch)
        assert Counter(name for step in epoch for ids in step for name in ids) == Counter(f"r{n}" for n in range(60))
        assert max(len(ids) for step in epoch for ids in step) > 3
        lengths = {f"r{n}": data.lengths[n] for n in range(60)}
        assert all(sum(lengths[name] for name in ids) <= 256 for step in epoch for ids in step)

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_the_world_does_not_change_what_a_step_holds(self, tmp_path: Path, world_size: int) -> None:
        data = self.data(tmp_path)
        count = self.loader(data).steps_per_epoch + 2
        alone = self.steps(self.loader(data), count)
        ranks = [self.steps(self.loader(data, rank=rank, world_size=world_size), count) for rank in range(world_size)]
        assert len(alone) == count
        for number, step in enumerate(alone):
            shared = [name for rank in ranks for ids in rank[number] for name in ids if name]
            assert Counter(shared) == Counter(name for ids in step for name in ids if name)

    def test_a_resumed_run_goes_on_exactly_also_in_later_epochs(self, tmp_path: Path) -> None:
        data = self.data(tmp_path)
        per_epoch = self.loader(data).steps_per_epoch
        whole = self.steps(self.loader(data), 3 * per_epoch)
        for start in (1, per_epoch, 2 * per_epoch + 1):
            assert self.steps(self.loader(data, start_step=start), 2) == whole[start : start + 2]

    def test_rows_share_a_micro_batch_within_the_budget(self, tmp_path: Path) -> None:
        data = self.data(tmp_path)
        free, bound = (
            self.steps(self.loader(data, micro_batch=4, tokens=tokens), 6) for tokens in (None, 512)
        )  # fmt: skip
        assert [sorted(sum(step, ())) for step in free] == [sorted(sum(step, ())) for step in bound]
        assert [len(step) for step in free[:5]] == [1] * 5
        assert {len(step) for step in bound} <= {1, 2}
        sizes = {f"r{number}": data.lengths[number] for number in range(60)}
        assert 256 < max(sum(sizes[name] for name in ids) for step in bound for ids in step) <= 512
        assert largest_batch(data, MicroBatchLimit(examples=4, tokens=600)).tokens <= 512

    def test_settings_that_cannot_work_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"at least data\.max_length"):
            DataConfig(pack_tokens=100, max_length=200)
        with pytest.raises(DataError, match=r"needs exact lengths.*Set data.cache"):
            self.data(tmp_path, exact_limit=5)
        assert self.data(tmp_path, exact_limit=5, cache=str(tmp_path / "cache")).lengths[0] > 0
