"""Nothing of the user is deleted or overwritten: what `mm_moslora.utils.files` does."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from between import just_before
from disk_trace import trace_disk

from mm_moslora.utils import files, folder_marks
from mm_moslora.utils.errors import ConfigError, MoSLoRAError
from mm_moslora.utils.file_locks import lock_file


def strangers(folder: Path) -> dict[str, Path]:
    """What anybody may have put at the place of a file, by kind."""
    (folder / "mine").write_text("years")
    found = {kind: folder / kind for kind in ("link", "dangling", "pipe", "folder")}
    found["link"].symlink_to(folder / "mine")
    found["dangling"].symlink_to(folder / "nothing")
    os.mkfifo(found["pipe"])
    found["folder"].mkdir()
    return found


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_nothing_is_written_through_a_link_or_into_a_pipe(kind, tmp_path):
    path = strangers(tmp_path)[kind]
    words = "a link to .*(mine|nothing)" if path.is_symlink() else "a folder, a pipe or a device"
    for write in (
        files.writing_in_place,
        lambda path: files.writing_in_place(path, append=True),
        lambda path: lock_file(path, wait=False),
    ):
        with pytest.raises(ConfigError, match=rf"{kind} is {words}, .* Delete it, or choose another folder"):
            write(path)
    said: list[str] = []
    files.Appender(path, say=said.append).add("a line")
    assert "Nothing is written through it" in said[0]
    assert (tmp_path / "mine").read_text() == "years"
    assert not (tmp_path / "nothing").exists()


def test_a_hard_link_keeps_what_it_had(tmp_path):
    mine, run = tmp_path / "mine", tmp_path / "run"
    run.mkdir()
    mine.write_text("years\n")
    for name in (folder_marks.MARK, "metrics.jsonl", "log.txt", "stacks.txt", "run.lock", "state.json"):
        (run / name).hardlink_to(mine)
    files.mark(run, "run")
    files.Appender(run / "metrics.jsonl").add("a line")
    files.writing_in_place(run / "log.txt", append=True).close()
    files.writing_in_place(run / "stacks.txt").close()
    files.replace_text(run / "state.json", "{}")
    with lock_file(run / "run.lock", wait=False) as lock:
        files.write_owner(lock, "process 1")
    alone, linked = tmp_path / "alone", tmp_path / "linked"
    alone.write_text("years\n")
    linked.hardlink_to(alone)
    files.Appender(linked).add("a line")
    assert [path.read_text() for path in (mine, alone)] == ["years\n"] * 2
    assert (run / "metrics.jsonl").read_text() == "years\na line\n"
    assert (run / folder_marks.MARK).read_text() == "years\nrun\n"
    assert (run / "stacks.txt").read_text() == ""
    with lock_file(tmp_path / "run.lock", wait=False) as lock:
        files.write_owner(lock, "a long owner")
        files.write_owner(lock, "process 1")
    assert (tmp_path / "run.lock").read_text() == "process 1"


def test_a_power_loss_leaves_the_old_or_the_new_content(tmp_path, monkeypatch):
    events = trace_disk(monkeypatch, tmp_path)
    files.replace_text(tmp_path / "state.json", "{}")
    assert events == ["sync .state.json~", ".state.json~ -> state.json", "sync ."]


def test_what_is_put_aside_replaces_nothing(tmp_path):
    for number, kind in enumerate(("file", "file", "folder")):
        path = tmp_path / "it"
        path.mkdir() if kind == "folder" else path.write_text(str(number))
        files.set_aside(path, "old")
    assert [(tmp_path / f"it.old{number}").read_text() for number in ("", "1")] == ["0", "1"]
    assert (tmp_path / "it.old2").is_dir()


def test_a_mark_is_not_written_through_a_link(tmp_path):
    paths = strangers(tmp_path)
    (paths["folder"] / folder_marks.MARK).symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="is a link to"):
        files.mark(paths["folder"], "run")
    (paths["folder"] / folder_marks.MARK).unlink()
    os.mkfifo(paths["folder"] / folder_marks.MARK)
    with pytest.raises(ConfigError, match="a pipe"):
        files.mark(paths["folder"], "run")
    assert (tmp_path / "mine").read_text() == "years"


def test_a_folder_of_a_run_is_no_link(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "stacks").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="stacks is a link to"):
        files.make_subfolder(tmp_path / "stacks")
    files.make_subfolder(tmp_path / "heartbeat")
    files.make_subfolder(tmp_path / "heartbeat")
    assert (tmp_path / "heartbeat").is_dir()


def test_a_file_in_place_keeps_its_content_only_where_lines_are_appended(tmp_path):
    for append, text in ((False, "a\n"), (True, "a\nb\n"), (False, "c\n")):
        with files.writing_in_place(tmp_path / "it", append=append) as stream:
            stream.write(text[-2:])
        assert (tmp_path / "it").read_text() == text


def test_a_file_of_a_run_is_a_regular_one_inside_it(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    paths = strangers(run)
    (tmp_path / "secret.json").write_text('{"key": 1}')
    (run / "out.json").symlink_to(tmp_path / "secret.json")
    (run / "own.json").write_text('{"a": 1}')
    (run / "near.json").symlink_to("own.json")
    for name in ("own.json", "near.json"):
        assert files.read_json(run / name) == {"a": 1}
    assert files.read_json(run / "out.json", linked=True) == {"key": 1}  # a path from a user leads anywhere
    (run / "stage").symlink_to(tmp_path)
    for path, below in ((run / "out.json", None), (run / "out.json", run), (run / "stage" / "secret.json", run)):
        with pytest.raises(MoSLoRAError, match="links out of"):
            files.read_json(path, below=below)
    for linked in (False, True):
        for kind in ("pipe", "folder"):
            with pytest.raises(MoSLoRAError, match="is a folder, a pipe or a device"):
                files.read_json(paths[kind], linked=linked)
        with pytest.raises(FileNotFoundError):
            files.read_json(run / "absent", linked=linked)
    os.truncate(run / "own.json", 2**40)
    with pytest.raises(MoSLoRAError, match="stay below"):
        files.read_json(run / "own.json")


def marked(folder: Path) -> Path:
    folder.mkdir()
    files.mark(folder, "temporary")
    (folder / "inner").mkdir()
    (folder / "inner" / "a").write_text("x")
    return folder


def test_a_folder_with_the_mark_goes_and_one_without_stays(tmp_path):
    files.remove(marked(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match=r"theirs is in the way and is not deleted: it has no \.mm_moslora"):
        files.remove(theirs)
    assert (theirs / "thesis.txt").read_text() == "years"
    files.remove(tmp_path / "absent")


def test_a_link_to_a_marked_folder_is_not_followed(tmp_path):
    target = marked(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ConfigError, match="link is in the way"):
        files.remove(tmp_path / "link")
    inside = marked(tmp_path / "ours")
    (inside / "link").symlink_to(target)
    files.remove(inside)
    assert (target / "inner" / "a").read_text() == "x"


def test_a_folder_that_another_thread_deletes_meanwhile_is_no_error(tmp_path, monkeypatch):
    folder = marked(tmp_path / "ours")
    just_before(monkeypatch, Path, "iterdir", lambda: shutil.rmtree(folder), when=lambda path: path == folder)
    files.remove(folder)
    assert not folder.exists()


def test_the_mark_goes_last(tmp_path, monkeypatch):
    """A deletion that is cut short can be done again."""
    folder = marked(tmp_path / "ours")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # the system refuses
    files.remove(folder)
    assert (folder / folder_marks.MARK).is_file()
    assert (folder / "inner" / "a").is_file()
    monkeypatch.undo()
    files.remove(folder)
    assert not folder.exists()


def test_a_folder_is_built_aside_and_what_a_killed_process_left_is_cleared(tmp_path):
    marked(tmp_path / ".set.partial")
    with files.building(tmp_path / "set", replaces=folder_marks.MARK) as part:
        assert not (tmp_path / "set").exists()
        (part / "a").write_text("1")
    with pytest.raises(OSError, match="a"), files.building(tmp_path / "set", replaces=folder_marks.MARK) as part:
        (part / "absent" / "a").write_text("2")
    assert (tmp_path / "set" / "a").read_text() == "1"
    with files.building(tmp_path / "set", replaces=folder_marks.MARK) as part:
        (part / "b").write_text("3")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [folder_marks.MARK, "b", "set"]
    with files.building(tmp_path / "set") as part:  # another host was faster
        (part / "c").write_text("4")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [folder_marks.MARK, "b", "set"]


@pytest.mark.parametrize("replaces", [None, folder_marks.MARK, "ready.json"])
def test_a_folder_that_holds_nothing_but_the_mark_does_not_cost_what_was_built(replaces, tmp_path):
    """An interrupted deletion leaves it."""
    for nothing in (True, False):
        (tmp_path / "set").mkdir()
        if nothing:
            files.mark(tmp_path / "set", "temporary")
        assert not folder_marks.is_built(tmp_path / "set")
        with files.building(tmp_path / "set", replaces=replaces) as part:
            (part / "a").write_text("1")
        assert (tmp_path / "set" / "a").read_text() == "1"
        assert folder_marks.is_built(tmp_path / "set")
        assert [path.name for path in tmp_path.iterdir()] == ["set"]
        files.mark(tmp_path / "set", "temporary")
        files.remove(tmp_path / "set")
    assert not folder_marks.is_built(tmp_path / "set")


def test_a_link_to_an_empty_folder_is_not_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "set").symlink_to(tmp_path / "empty")
    with pytest.raises(OSError), files.building(tmp_path / "set") as part:  # noqa: PT011  (what the system says)
        (part / "a").write_text("1")
    assert (tmp_path / "set").is_symlink()


def test_a_folder_of_the_user_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(ConfigError, match="Move it away"), files.building(tmp_path / "set", replaces=folder_marks.MARK):
        pytest.fail("this may take an hour")


def test_names_of_a_run_in_a_folder_of_the_user_are_refused_with_the_way_out(tmp_path):
    folder_marks.refuse_strangers(tmp_path / "new", ["config.yaml"], kind="run")
    (tmp_path / "notes.txt").touch()
    folder_marks.refuse_strangers(tmp_path, ["config.yaml"], kind="run")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"already holds config\.yaml.*echo run >> .*\.mm_moslora") as caught:
        folder_marks.refuse_strangers(tmp_path, ["config.yaml"], kind="run")
    files.mark(tmp_path, "evaluation")
    with pytest.raises(ConfigError, match="a run of mm_moslora"):
        folder_marks.refuse_strangers(tmp_path, ["config.yaml"], kind="run")
    assert os.system(str(caught.value).rpartition("mark it: ")[2]) == 0
    folder_marks.refuse_strangers(tmp_path, ["config.yaml"], kind="run")


SIGN = '<meta name="generator" content="mm_moslora">'


def test_a_page_replaces_a_page_and_nothing_else(tmp_path):
    page = tmp_path / "report.html"
    assert folder_marks.output_file(page) == page
    own = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n' + SIGN
    quotes = (f"Notes: {own}", own.replace("<meta charset", "<p>x</p><meta"))
    for text in ("", "<!doctype html><p>my own page</p>", *quotes):
        page.write_text(text)
        with pytest.raises(ConfigError, match=r"report\.html exists and is not replaced"):
            folder_marks.output_file(page, sign=folder_marks.PAGE_SIGN)
    page.write_text(f"{own}\n</head>")
    assert folder_marks.output_file(page, sign=folder_marks.PAGE_SIGN) == page
    with pytest.raises(ConfigError, match="is not replaced"):
        folder_marks.output_file(page)
    with pytest.raises(ConfigError, match="is a folder; expected the file"):
        folder_marks.output_file(tmp_path)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_a_page_replaces_no_link_and_no_pipe(kind, tmp_path):
    path = strangers(tmp_path)[kind]
    with pytest.raises(ConfigError, match="exists and is not replaced"):
        folder_marks.output_file(path, sign=folder_marks.PAGE_SIGN)


def test_a_full_disk_costs_no_line(tmp_path, monkeypatch):
    said: list[str] = []
    log, real, room = files.Appender(tmp_path / "log.jsonl", say=said.append), os.write, [4]

    def write(descriptor: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: room[0]]
        room[0] -= len(part)
        return real(descriptor, part)

    monkeypatch.setattr(files.os, "write", write)
    for number in range(3):
        log.add(f"line {number}")
    assert (tmp_path / "log.jsonl").read_text() == "line"
    assert len(said) == 1
    assert "No space left on device" in said[0]
    room[0] = 1000
    log.add("line 3")
    assert (tmp_path / "log.jsonl").read_text() == "line 0\nline 1\nline 2\nline 3\n"
    assert said[1].endswith("is written again; 0 lines were lost.")


def test_what_waits_for_a_full_disk_is_bounded(tmp_path):
    log = files.Appender(tmp_path / "absent" / "log.jsonl", say=lambda text: None)
    for _ in range(20):
        log.add("x" * 100_000)
    (tmp_path / "absent").mkdir()
    log.add("the last")
    assert (tmp_path / "absent" / "log.jsonl").stat().st_size <= 2**20 + 10


def test_a_copy_of_a_model_follows_no_link_out_of_its_folder(tmp_path):
    source, secret = tmp_path / "model", tmp_path / "secret"
    source.mkdir()
    secret.write_text('{"key": 1}')
    (source / "tokenizer.json").symlink_to("tokenizer.txt")
    (source / "tokenizer.txt").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"a": "\u00e4", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "out").mkdir()
    files.copy_of_model(source, ["tokenizer.json", "tokenizer_config.json", "missing.json"], tmp_path / "out")
    assert {path.name: path.is_symlink() for path in (tmp_path / "out").iterdir()} == {
        "tokenizer.json": False, "tokenizer_config.json": False
    }  # fmt: skip
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    (source / "folder").symlink_to(tmp_path)
    os.mkfifo(source / "pipe")
    (source / "vocab.json").symlink_to(secret)
    (source / "merges.txt").symlink_to("vocab.json")
    (source / "null").symlink_to("/dev/null")
    for name in ("vocab.json", "merges.txt", "folder/secret", "../secret", str(secret), "pipe", "null", "folder"):
        with pytest.raises(MoSLoRAError):
            files.copy_of_model(source, [name], tmp_path / "out")
    assert len([*(tmp_path / "out").iterdir()]) == 2


def test_a_copy_out_of_the_hubs_cache_takes_the_blobs_of_its_repository_alone(tmp_path):
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "0"
    for folder in (snapshot, repository / "blobs", tmp_path / "hub" / "models--c--d" / "blobs", tmp_path / "out"):
        folder.mkdir(parents=True)
    for folder in (repository, tmp_path / "hub" / "models--c--d"):
        (folder / "blobs" / "1").write_text(folder.name)
    (snapshot / "tokenizer.model").symlink_to("../../blobs/1")
    (snapshot / "vocab.txt").symlink_to("../../../models--c--d/blobs/1")
    files.copy_of_model(snapshot, ["tokenizer.model"], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "models--a--b"
    with pytest.raises(MoSLoRAError, match="links out of"):
        files.copy_of_model(snapshot, ["vocab.txt"], tmp_path / "out")
