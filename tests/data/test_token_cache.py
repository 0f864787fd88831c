"""The cache of tokenised records: shared by runs and processes, rebuilt when anything changes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_records
from waiting import wait_until

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data import token_cache
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.data.worker_processes import in_processes
from mm_moslora.utils import files
from mm_moslora.utils.file_locks import lock_file
from tests.data.sets import chatml_encoder, make_set, tiny_tower


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestTokenCache:
    def sets(self, path: Path, cache: Path, **options):
        plain = make_set(path, **options)
        return plain, make_set(path, cache=str(cache), **options)

    def test_it_gives_the_same_examples_and_the_same_faults(self, tmp_path: Path) -> None:
        path = make_records(tmp_path, 20)
        with path.open("a") as stream:
            stream.write('{"id": "bad"}\n{"id": NaN}\n')
        plain, cached = self.sets(path, tmp_path / "cache", max_bad_share=0.5)
        assert list(plain.lengths) == list(cached.lengths)
        assert plain.members == cached.members
        assert plain.has_image == cached.has_image
        assert plain.quarantine.codes == cached.quarantine.codes
        for number in plain.usable:
            one, other = plain.load(number), cached.load(number)
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.supervised, other.supervised)
            assert len(one.pictures) == len(other.pictures)
        with pytest.raises(RecordError, match=r"train.jsonl:21 \(record 20, id='bad'\)"):
            cached.load(20)

    def test_a_second_run_tokenises_nothing(self, tmp_path: Path, monkeypatch) -> None:
        path = make_records(tmp_path, 12)
        first = make_set(path, cache=str(tmp_path / "cache"))
        monkeypatch.setattr(type(first.encoder), "encode", None)
        again = make_set(path, cache=str(tmp_path / "cache"))
        assert list(again.lengths) == list(first.lengths)
        assert again.load(3) is not None

    def test_other_content_or_another_limit_makes_another_cache(self, tmp_path: Path) -> None:
        path, cache = make_records(tmp_path, 12), tmp_path / "cache"
        make_set(path, cache=str(cache))
        make_set(path, cache=str(cache), max_length=64)
        path.write_text(path.read_text().replace("color", "colour"))
        make_set(path, cache=str(cache))
        assert len([item for item in cache.iterdir() if item.is_dir()]) == 3

    def test_what_pictures_may_be_decides_which_records_are_faulty_so_other_rules_make_another_cache(
        self, tmp_path: Path
    ) -> None:
        path, cache = make_records(tmp_path, 12, text_only_every=0), tmp_path / "cache"
        path.write_text(path.read_text().replace('"image": "0.png"', '"image": "https://pictures.example/0.png"'))

        def usable(**rules: Any) -> int:
            source = SourceConfig(path=str(path), image_folder=str(tmp_path / "images"), **rules)
            config = DataConfig(cache=str(cache), max_bad_share=0.5)
            return len(TrainingSet([source], chatml_encoder(), tiny_tower(), config=config).usable)

        assert usable() == 11
        assert usable(image_hosts=["pictures.example"]) == 12
        assert usable() == 11
        assert len([item for item in cache.iterdir() if item.is_dir()]) == 2

    def test_what_a_killed_process_left_is_no_cache(self, tmp_path: Path) -> None:
        path, cache = make_records(tmp_path, 12), tmp_path / "cache"
        make_set(path, cache=str(cache))
        (folder,) = [item for item in cache.iterdir() if item.is_dir()]
        folder.rename(folder.with_name(folder.name + ".part"))
        (folder.with_name(folder.name + ".part") / "records.arrow").write_bytes(b"half")
        assert len(make_set(path, cache=str(cache)).usable) == 12

    def test_a_folder_that_holds_nothing_but_the_mark_is_no_cache(self, tmp_path: Path) -> None:
        path, cache = make_records(tmp_path, 12), tmp_path / "cache"
        first = make_set(path, cache=str(cache))
        (folder,) = [item for item in cache.iterdir() if item.is_dir()]
        for item in folder.iterdir():
            item.unlink()
        files.mark(folder, "temporary")
        assert list(make_set(path, cache=str(cache)).lengths) == list(first.lengths)

    @pytest.mark.parametrize("cut", [False, True])
    @pytest.mark.parametrize("name", ["records.arrow", "sum.json"])
    def test_damage_is_found_and_changes_no_token(self, name: str, cut: bool, tmp_path: Path) -> None:
        """A flipped bit leaves the lengths as they were, so nothing else would find it."""
        path, cache = make_records(tmp_path, 12), tmp_path / "cache"
        with path.open("a") as stream:
            stream.write('{"id": "bad"}\n')
        plain, first = self.sets(path, cache, max_bad_share=0.5)
        (folder,) = [item for item in cache.iterdir() if item.is_dir()]
        content = (folder / name).read_bytes()
        for place in range(0, len(content), max(1, len(content) // 7)):
            spoiled = content[:place] if cut else bytes([*content[:place], content[place] ^ 1, *content[place + 1 :]])
            (folder / name).write_bytes(spoiled)
            again = make_set(path, cache=str(cache), max_bad_share=0.5)
            assert again.fingerprint == first.fingerprint
            assert again.quarantine.codes == plain.quarantine.codes
            for number in plain.usable:
                one, other = plain.load(number), again.load(number)
                assert torch.equal(one.input_ids, other.input_ids)
                assert torch.equal(one.supervised, other.supervised)

    @pytest.mark.parametrize("hidden", [2, 3])
    def test_a_host_that_does_not_see_yet_that_another_was_first_uses_what_is_there(
        self, hidden: int, tmp_path: Path, monkeypatch
    ) -> None:
        """As on a network file system that remembers for some seconds what was not there."""
        path, cache = make_records(tmp_path, 12), tmp_path / "cache"
        first = make_set(path, cache=str(cache))
        (folder,) = [item for item in cache.iterdir() if item.is_dir()]
        looks = itertools.count()
        iterdir = Path.iterdir

        def seen(self: Path) -> Iterator[Path]:
            if self == folder and next(looks) < hidden:
                raise FileNotFoundError(self)
            return iterdir(self)

        monkeypatch.setattr(Path, "iterdir", seen)
        assert list(make_set(path, cache=str(cache)).lengths) == list(first.lengths)
        assert next(looks) > hidden
        assert not list(cache.glob("*.part"))

    def test_a_build_that_is_killed_leaves_no_process_and_no_lock(self, tmp_path: Path) -> None:
        """As when memory runs out: whoever came next would wait for ever."""

        def work(number: int) -> int:
            (tmp_path / f"{os.getpid()}.pid").touch()
            time.sleep(0.01)
            return number

        def build() -> None:
            with lock_file(tmp_path / "cache.lock", wait=True):
                for _ in in_processes(work, range(10**6), processes=2):
                    pass

        process = multiprocessing.get_context("fork").Process(target=build)
        process.start()
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        process.kill()
        process.join()
        with lock_file(tmp_path / "cache.lock", wait=False):
            pass
        wait_until(lambda: not any(alive(int(path.stem)) for path in tmp_path.glob("*.pid")))

    @pytest.mark.slow
    def test_processes_that_come_together_build_it_once(self, tmp_path: Path, monkeypatch) -> None:
        path = make_records(tmp_path, 60)
        counter = tmp_path / "built"
        build = token_cache._write

        def counted(*arguments) -> None:
            with counter.open("a") as stream:
                stream.write("x")
            build(*arguments)

        monkeypatch.setattr(token_cache, "_write", counted)
        monkeypatch.setattr(token_cache, "_ROWS", 8)  # several processes tokenise
        context = multiprocessing.get_context("fork")
        results = context.Queue()

        def work() -> None:
            results.put(list(make_set(path, cache=str(tmp_path / "cache")).lengths))

        processes = [context.Process(target=work) for _ in range(3)]
        for process in processes:
            process.start()
        lengths = [results.get(timeout=180) for _ in processes]
        for process in processes:
            process.join()
        assert counter.read_text() == "x"
        assert lengths[0] == lengths[1] == lengths[2] == list(make_set(path).lengths)
