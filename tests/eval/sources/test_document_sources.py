"""Valid data become documents, invalid data and answers a clear error or a counted failure, never a wrong score."""

from __future__ import annotations

import base64
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.protocol.model_interface import Answer, Request
from mm_moslora_eval.protocol.task_registry import all_tasks, get_task, load_file, task_file
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.run.result_file import TaskResult
from mm_moslora_eval.run.scored_subsets import read_samples
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.sources import load
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.source import Source
from mm_moslora_eval.sources.source_images import Hasher
from mm_moslora_eval.sources.vlmevalkit_tsv import parse_list
from PIL import Image

from mm_moslora.utils.errors import ConfigError, DataError, EvalError, MoSLoRAError
from tests.eval.eval_data import picture
from tests.eval.eval_fake import FakeModel

Writer = Callable[..., Path]
ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def documents(path: Path) -> dict[str, Document]:
    return {document.id: document for document in get_task(f"tsv:{path}").load().documents}


def row(index: int, image: str, **more: Any) -> dict[str, Any]:
    base = {"index": index, "image": image, "question": f"What is it? ({index})", "hint": "nan", "A": "cat", "B": "dog"}
    return base | {"C": "", "D": "nan", "answer": "A", "category": "animals"} | more


def test_tsv_rows_become_documents(write_tsv: Writer, encoded: str) -> None:
    found = documents(write_tsv([row(7, encoded), row(8, "7", hint="Look twice.", answer="B")]))
    first, second = found["7"], found["8"]
    assert first.images == second.images == (base64.b64decode(encoded),)
    assert first.options == {"A": "cat", "B": "dog"}
    assert first.hint is None
    assert second.hint == "Look twice."
    assert second.answers == ("B",)
    assert first.category == "animals"


def test_tsv_cells_with_quotes_tabs_newlines_megabytes_and_foreign_scripts(write_tsv: Writer, encoded: str) -> None:
    texts = ['He said "no"\tand\nleft', "אבג מה זה", "图中是什么？", "x" * 2_000_000]
    found = documents(write_tsv([row(n, encoded, question=text) for n, text in enumerate(texts)]))
    assert [found[str(n)].question for n in range(4)] == texts
    assert all(document.problem is None for document in found.values())


def test_tsv_option_that_reads_none_is_an_option(write_tsv: Writer, encoded: str) -> None:
    found = documents(write_tsv([row(1, encoded, B="None", C="NA", answer="B")]))
    assert found["1"].options == {"A": "cat", "B": "None", "C": "NA"}


def test_tsv_text_after_a_closing_quote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "loose.tsv"
    path.write_text('index\tquestion\tanswer\n1\t"Hello" she said\ta\n')
    assert documents(path)["1"].question == "Hello she said"


def test_lists_are_parsed_and_never_evaluated() -> None:
    assert parse_list("['a', \"b's\"]") == ["a", "b's"]
    assert parse_list('["it\\"s"]') == ['it"s']
    for text in ("__import__('os').getcwd()", "['a'] + ['b']", "[1, 2]", "plain", "['a', open('x')]"):
        assert parse_list(text) == []


def test_input_01_missing_file_names_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_MOSLORA_DATA", str(tmp_path))
    with pytest.raises(EvalError, match=r"looked at .*MM_MOSLORA_DATA"):
        get_task("tsv:nowhere.tsv").load()
    (tmp_path / "nowhere.tsv").write_text("index\tquestion\tanswer\n1\tq\ta\n")
    assert len(get_task("tsv:nowhere.tsv").load().documents) == 1


def test_input_01_wrong_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("index\tquestion\tanswer\n1\tq\ta\n")
    (tmp_path / "t.yaml").write_text("name: t\nsource: {kind: tsv, path: d.tsv, md5: 00}\n".replace("00", "'00'"))
    with pytest.raises(EvalError, match="expects 00: it is another version"):
        get_task(str(tmp_path / "t.yaml")).load()


def test_a_template_that_names_no_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("index\tquestion\tanswer\tplace\n1\tq\ta\there\n")
    for name in ("place", "questoin"):
        (tmp_path / "t.yaml").write_text(
            f"name: t\nsource: {{kind: tsv, path: d.tsv}}\nprompt: {{template: 'At {{{name}}}: {{question}}'}}\n"
        )
        task = get_task(str(tmp_path / "t.yaml"))
        if name == "place":
            assert task.prompt.text(task.load().documents[0]) == "At here: q"
        else:
            with pytest.raises(EvalError, match=r"\{questoin\}, which no document .*Did you mean 'question'"):
                task.load()


def test_llava_conversations_give_one_document_per_pair(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(picture(1))
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes")]
    record = {"id": "r", "image": "p.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    path = tmp_path / "c.json"
    path.write_text(json.dumps([record]))
    task = get_task(f"llava:{path}")
    first, second = task.load().documents
    assert (first.id, first.answers, second.id, second.answers) == ("r:0", ("A cat.",), "r:1", ("Yes",))
    assert [message.text for document in (first, second) for message in task.prompt.messages(document)] == [
        "<image>\nWhat?",
        "<image>\nSure?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("index\tquestion\n1\tq\n", "no column answer"),
        ("index\tquestion\tanswer\n1\tq\n", "row 2 has 2 cells, the header has 3"),
        ('index\tquestion\tanswer\n1\t"open\ta\n2\tq\tb\n', "never closed"),
        ("index\tquestion\tanswer\n1\tq\ta\n1\tr\tb\n", "1 repeated ids \\('1'\\)"),
        ("index\tquestion\tanswer\n", "holds no documents"),
        ("{broken", "line 1 is not valid JSON"),
        ("[1, 2]", "record 1 is a int"),
        ('{"question_id": 1, "answer": "a"}', "needs `question_id` and `text`"),
        ('{"question_id": NaN, "text": "q", "answer": "a"}', "needs `question_id` and `text`"),
        ('{"question_id": [1], "text": "q", "answer": "a"}', "needs `question_id` and `text`"),
        ('{"id": "x", "conversations": [{"from": "human", "value": "q"}]}', "human/gpt pairs"),
        ('{"id": "x", "conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}]}', "are from"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    kind = "llava" if text[:1] in ("{", "[") else "tsv"
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(EvalError, match=message):
        get_task(f"{kind}:{tmp_path / 'q.jsonl'}").load()


def test_an_answer_that_is_no_text_is_a_fault_of_its_question(tmp_path: Path) -> None:
    rows = [{"question_id": number, "text": "q", "answer": "a"} for number in range(7)]
    for row, odd in zip(rows[:4], ({"x": 1}, math.nan, [["a"]], [{"text": "a"}]), strict=True):
        row["answer"] = odd
    rows[4:] = [rows[4] | {"answers": [{"answer": "a"}, {"answer": "b"}]}, rows[5] | {"answer": 3}, rows[6]]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = get_task(f"llava:{path}").load().documents
    assert ["expected text" in (document.problem or "") for document in documents] == 4 * [True] + 3 * [False]
    assert [document.answers for document in documents[4:]] == [("a", "b"), ("3",), ("a",)]


def test_llava_image_tags_that_differ_from_the_images_are_a_counted_failure(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(picture(1))
    rows = [
        {"question_id": "two", "image": "p.png", "text": "<image><image> same?", "answer": "yes"},
        {"question_id": "one", "image": "p.png", "text": "red?", "answer": "yes"},
        {"question_id": "out", "image": "../p.png", "text": "red?", "answer": "yes"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    model = FakeModel()
    (result,) = evaluate(model, get_task(f"llava:{path}"), tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    assert model.asked == ["one"]
    assert result.counts.failed == 2


def test_braces_in_a_question_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question_id": 1, "text": "Is {hint} in {0}?", "answer": "no"}) + "\n")
    task = get_task(f"llava:{path}")
    assert task.prompt.text(task.load().documents[0]) == "Is {hint} in {0}?"


def hf_documents(folder: Path, images: list[Any], **source: str) -> list[Document]:
    """Documents of a task file with a parquet file beside it."""
    import datasets

    rows = [{"id": str(n), "question": "q", "answer": "a", "image": image} for n, image in enumerate(images)]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "d.parquet"))
    keys = "".join(f", {key}: {value}" for key, value in source.items())
    (folder / "own.yaml").write_text(f"name: mine\nsource: {{kind: hf, path: d.parquet{keys}}}\n")
    return list(get_task(str(folder / "own.yaml")).load().documents)


@pytest.mark.parametrize("kind", ["names", "cells"])
def test_hf_pictures_lie_below_their_folder_and_beside_the_task_file(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.png").write_bytes(picture(1))
    (tmp_path / "id_rsa").write_text("private")
    (tmp_path / "set" / "images" / "link.png").symlink_to(tmp_path / "id_rsa")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.png").write_bytes(picture(2))
    monkeypatch.chdir(elsewhere)
    bad = [str(tmp_path / "id_rsa"), "../../id_rsa", "link.png", "/dev/zero", "b.png", "http://localhost/a.png", "a\0b"]
    names = ["a.png", *bad]
    images: list[Any] = names if kind == "names" else [{"bytes": None, "path": name} for name in names]
    first, *others = hf_documents(tmp_path / "set", images, image_folder="images")
    assert (first.images, first.problem) == ((tmp_path / "set" / "images" / "a.png",), None)
    shown = {name: one.problem or problem_of(one) for name, one in zip(bad, others, strict=True)}
    assert all(shown.values()), shown


def test_a_picture_cell_opens_nothing_outside_either(tmp_path: Path) -> None:
    import datasets
    import pyarrow.parquet

    (tmp_path / "id_rsa").write_text("private")
    (tmp_path / "set").mkdir()
    cells = [{"bytes": picture(1), "path": None}, {"bytes": None, "path": str(tmp_path / "id_rsa")}]
    cells += [{"bytes": None, "path": "/dev/zero"}, {"bytes": None, "path": "zip://a.png::/tmp/a.zip"}]
    rows = [{"id": str(n), "question": "q", "answer": "a", "image": cell} for n, cell in enumerate(cells)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    table = table.cast_column("image", datasets.Image())
    pyarrow.parquet.write_table(table.data.table, tmp_path / "set" / "d.parquet")
    (tmp_path / "set" / "own.yaml").write_text("name: mine\nsource: {kind: hf, path: d.parquet}\n")
    first, *others = get_task(str(tmp_path / "set" / "own.yaml")).load().documents
    assert problem_of(first) is None
    assert [one.id for one in others if problem_of(one) is None] == []


def problem_of(document: Document) -> str | None:
    """The reason why a document cannot be asked, after its pictures are read."""
    task = get_task("pope")
    return Preparation(task, [document], mode="own", seed=0, fingerprint="", hasher=Hasher()).items[0].problem


def test_paths_of_a_task_file_start_at_the_task_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tasks", "here"):
        (tmp_path / name / "images").mkdir(parents=True)
    text = '{"question_id": 1, "image": "a.png", "text": "q", "answer": "a"}\n'
    (tmp_path / "here" / "q.jsonl").write_text(text)
    (tmp_path / "tasks" / "own.yaml").write_text(
        "name: mine\nsource: {kind: llava, path: q.jsonl, image_folder: images}\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(EvalError, match=r"is not at .*tasks/q\.jsonl, but at .*here/q\.jsonl"):
        get_task("../tasks/own.yaml").load()
    (tmp_path / "tasks" / "q.jsonl").write_text(text)
    task = get_task("../tasks/own.yaml")
    monkeypatch.chdir("/")
    assert task.load().documents[0].images == (tmp_path / "tasks" / "images" / "a.png",)


ODD_PROTOCOLS = ("{a: [1]}", "{a: x}", "[a]", "x", "{}")
NO_NAMES = ("'../../elsewhere'", "'/tmp/x'", "'..'", "'a/b'", "'a@b'", "''", "'a\\b'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: t\nsource: {kind: tsv, path: x}\npromt: {}\n", "unknown key 'promt'.*Did you mean 'prompt'"),
        ("name: t\nsource: {kind: tsv, path: x, md6: x}\n", "unknown key 'source.md6'"),
        ("name: t\nsource: {kind: tsv, path: x}\nmetric: anlz\n", "metric 'anlz' is not known.*'anls'"),
        ("name: t\nsource: {kind: tsv, path: x}\nextraction: leter\n", "Did you mean 'letter'"),
        ("name: t\nname: u\n", "written twice"),
        ("name: t\n", "missing source"),
        *((f"name: t\nprotocols: {form}\n", "`protocols` must map names") for form in ODD_PROTOCOLS),
        *((f"name: {name}\nsource: {{kind: tsv, path: x}}\n", "not acceptable") for name in NO_NAMES),
        *((f"name: t\nprotocol: {name}\nsource: {{kind: tsv, path: x}}\n", "not acceptable") for name in NO_NAMES),
        (f"name: t\nprotocol: {'x' * 300}\nsource: {{kind: tsv, path: x}}\n", "name of more than"),
        (
            "name: t\nsource: {kind: tsv, path: x}\nprompt: {function: mathvista_formt}\n",
            "Did you mean 'mathvista_format'",
        ),
    ],
)
def test_task_file_with_a_fault_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises((ConfigError, EvalError), match=message):
        load_file(path)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(MoSLoRAError, match="Did you mean 'mmbench_en_dev'"):
        get_task("mmbench_en_dv")
    with pytest.raises(MoSLoRAError, match="no protocol 'llama'; it has llava"):
        get_task("pope@llama")


def test_every_shipped_task_is_valid_and_described() -> None:
    tasks = all_tasks()
    assert len({task.name for task in tasks.values()}) >= 30
    for identifier, task in tasks.items():
        assert task.title, identifier
        assert task.expected_count or "expected_count" in task.unverified, identifier
    assert "pope" in eval_commands.list_tasks()
    assert "published:   85.9" in eval_commands.describe("pope@llava")
    assert "published" not in eval_commands.describe("pope@vlmevalkit")


def test_pictures_are_opened_as_in_training(tmp_path: Path) -> None:
    """Transparent on white, wide grey scaled, rotation applied; the blind control is made from the same pixels."""
    import numpy as np
    from mm_moslora_eval.sources.source_images import mean_image, open_image
    from PIL import Image

    from mm_moslora.data.images.record_picture import open_image as decoded_for_training

    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), (9, 9, 9)).save(tmp_path / "turned.jpg", exif=exif)
    for path in sorted(tmp_path.iterdir()):
        expected = decoded_for_training(path)
        for source in (path, path.read_bytes(), Image.open(path)):
            assert open_image(source).size == expected.size
            assert np.array_equal(np.asarray(open_image(source)), np.asarray(expected))
    assert mean_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert 120 < mean_image(tmp_path / "grey16.png").getpixel((0, 0))[0] < 136


@pytest.mark.parametrize("state", ["[1]", '{"_data_files": "x"}', "{", '{"_data_files": [{"filename": 3}]}'])
def test_a_saved_folder_that_is_damaged_is_one_clear_error(state: str, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"id": ["a"], "question": ["1?"], "answer": ["x"]}).save_to_disk(str(tmp_path / "d"))
    (tmp_path / "d" / "state.json").write_text(state)
    with pytest.raises((EvalError, DataError)) as caught:
        load(Source(kind="hf", path="d"), beside=tmp_path)
    assert str(caught.value)


def test_a_hub_set_shows_no_cached_picture_of_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    files = [tmp_path / f"datasets--{name}" / "snapshots" / "1" / "a.png" for name in ("me--private", "evil--set")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(picture(1))
    for kind in ("text", "picture"):
        rows = [
            {"id": str(number), "question": "?", "answer": "x", "image": str(file)} for number, file in enumerate(files)
        ]
        table = datasets.Dataset.from_list(rows)
        if kind == "picture":
            table = table.cast_column("image", datasets.Image())
        monkeypatch.setattr("mm_moslora.data.sources.hf_tables.load_checked", lambda *_, table=table, **__: table)
        private, own = load(Source(kind="hf", path="evil/set"), beside=tmp_path).documents
        if kind == "text":
            assert "leaves" in str(private.problem)
            assert own.problem is None
        else:
            with pytest.raises(DataError, match="leaves"):
                private.images[0].read()
            assert own.images[0].read() == picture(1)


def test_a_saved_folder_is_identified_by_content_and_a_hub_set_by_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import datasets

    table = datasets.Dataset.from_dict({"id": ["a", "b"], "question": ["1?", "2?"], "answer": ["x", "y"]})
    table.save_to_disk(str(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    tasks = {}
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"name: mine\nsource: {{kind: hf, path: {tmp_path / name}}}\n")
        tasks[name] = get_task(str(tmp_path / f"{name}.yaml"))
    first, second = (task.load() for task in tasks.values())
    assert first.sha256 == second.sha256
    assert len(first.sha256) == 64
    assert first.revision is None
    changed = datasets.Dataset.from_dict({"id": ["a", "b"], "question": ["1?", "2?"], "answer": ["x", "z"]})
    shutil.rmtree(tmp_path / "two")
    changed.save_to_disk(str(tmp_path / "two"))
    assert tasks["two"].load().sha256 != first.sha256

    commit, asked = "0123456789abcdef" * 2 + "01234567", {}
    table.info.download_checksums = {f"hf://datasets/o/n@{commit}/test.parquet": {"num_bytes": 1, "checksum": None}}

    def load(*_: object, **options: object) -> datasets.Dataset:
        asked.update(options)
        return table

    monkeypatch.setattr("mm_moslora.data.sources.hf_tables.load_checked", load)
    (tmp_path / "hub.yaml").write_text("name: mine\nsource: {kind: hf, path: o/n, revision: v1}\n")
    data = get_task(str(tmp_path / "hub.yaml")).load()
    assert data.to_dict()["revision"] == commit
    assert asked["revision"] == "v1"


def test_pages_of_omnidocbench_are_answered_and_exported(tmp_path: Path) -> None:
    folder, pages = tmp_path / "images", [{"page_info": {"image_path": f"p.{n}.jpg"}} for n in range(2)]
    folder.mkdir()
    for page in pages:
        Image.new("RGB", (8, 8)).save(folder / page["page_info"]["image_path"])
    (tmp_path / "OmniDocBench.json").write_text(json.dumps(pages))
    text = task_file("omnidocbench_v15").read_text().replace("OmniDocBench/OmniDocBench", "OmniDocBench")
    (own := tmp_path / "own.yaml").write_text(text)
    (result, *_) = evaluate(FakeModel(), get_task(str(own)), tmp_path / "run", modes=("own",), settings=ONE)
    assert "no reference answers" in result.about["unscored"]
    (archive,) = (tmp_path / "run").rglob("submission.zip")
    with zipfile.ZipFile(archive) as written:
        assert written.namelist() == ["p.0.md", "p.1.md"]


def test_an_annotation_without_its_picture_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "pages.json").write_text(json.dumps([{"page": {"name": "p.png"}}, {"page": {}}]))
    with pytest.raises(EvalError, match=r"record 2 has no name at 'page.name'"):
        load(Source(kind="annotations", path=str(path), columns={"image": "page.name"}))


class Fixed(FakeModel):
    """Answers with given texts in the order of the documents' ids."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = texts

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        for index, request in enumerate(requests):
            yield index, Answer(text=self.texts[int(request.id)], tokens=1, finish_reason="stop")


def rows_of(texts: Sequence[str], encoded: str, **more: Any) -> list[dict[str, Any]]:
    base = {"image": encoded, "question": "What is it?", "hint": "nan", "A": "cat", "B": "dog", "answer": "A"}
    return [{"index": number, **base, **more} for number in range(len(texts))]


def score(path: Path, texts: Sequence[str], run: Path) -> tuple[TaskResult, list[dict[str, Any]]]:
    (result,) = evaluate(Fixed(texts), get_task(f"tsv:{path}"), run, modes=("own",), baselines=(), settings=ONE)
    assert result.n == result.counts.total == len(texts), "N scored equals N in the data"
    return result, read_samples(run / "bench@own" / "own")


def counted(path: Path, problem: str, run: Path) -> None:
    """Row 0 is valid and right. Row 1 is invalid: it is recorded, counts as wrong and does not affect row 0."""
    result, samples = score(path, ["A", "A"], run)
    assert (result.score, result.counts.failed, result.counts.scored) == (0.5, 1, 1)
    assert problem in samples[1]["error"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image": "!!!! not base64 " * 8}, "not base64"),
        ({"image": "77"}, "does not exist"),
        ({"image": "1"}, "refers back to it"),
        ({"answer": "D"}, "not one of the options"),
        ({"answer": ""}, "no reference answer"),
        ({"question": "What\0is it?"}, "NUL byte"),
        ({"image": "", "image_path": "gone.png"}, "cannot be read"),
        ({"image": "", "image_path": "../../etc/passwd"}, "leaves /"),
    ],
    ids=[
        "base64 junk", "image index that points nowhere", "image index that points to itself",
        "answer letter outside the options", "no reference", "NUL", "missing image", "image outside the folder",
    ],
)  # fmt: skip
def test_a_bad_row_is_counted(
    change: dict[str, Any], problem: str, write_tsv: Writer, encoded: str, tmp_path: Path
) -> None:
    rows = rows_of(["A", "A"], encoded)
    counted(write_tsv([rows[0], rows[1] | change]), problem, tmp_path / "run")


def test_input_04_empty_and_endless_answers(write_tsv: Writer, encoded: str, tmp_path: Path) -> None:
    texts = ["", "   \n", "A " * 5000, "word " * 2000 + "B", "\0", "\ud800", "A\u2028"]
    result, samples = score(write_tsv(rows_of(texts, encoded)), texts, tmp_path / "run")
    assert [sample["parsed"] for sample in samples] == ["", "", "", "B", "", "", "A"]
    assert result.counts.not_inferable == 5
    assert result.score == pytest.approx(1 / 7)
    assert [sample["text"] for sample in samples] == [*texts[:5], "\ufffd", texts[6]], "answers are kept as they came"


def test_a_model_that_answers_code_is_not_run(write_tsv: Writer, encoded: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    texts = [f"__import__('pathlib').Path({str(marker)!r}).touch()"]
    score(write_tsv(rows_of(texts, encoded, A="", B="", answer="['x', 'y']")), texts, tmp_path / "run")
    assert not marker.exists()


def test_a_set_without_references_is_exported_and_a_missing_one_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    rows = [{"question_id": n, "image": "a.png", "text": f"Q{n}?"} for n in range(2)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Fixed(["yes", "yes"])
    run = {"modes": ("own",), "baselines": (), "settings": ONE}
    (result,) = evaluate(model, get_task(f"llava:{path}"), tmp_path / "none", **run)
    assert "no reference answers" in result.about["unscored"]
    rows[0]["answer"] = "yes"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result,) = evaluate(model, get_task(f"llava:{path}"), tmp_path / "one", **run)
    assert (result.score, result.counts.failed) == (0.5, 1)
