"""Files of answers from other programs, and the markers that a chat template writes around reasoning."""

from __future__ import annotations

import base64
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from mm_moslora_eval.backends.model_fingerprint import ReasoningMarkers
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.backends.replay_model import ReplayModel
from mm_moslora_eval.protocol.model_interface import IMAGE, Message, Model, Request
from mm_moslora_eval.protocol.task import AnswerReasoning, Task
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.result_file import TaskResult
from mm_moslora_eval.run.scored_subsets import read_samples
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.scored_sample import without_thinking
from tokenizers import AddedToken
from transformers import AutoTokenizer

from mm_moslora.data.chat.chat_template import Template
from mm_moslora.utils.errors import EvalError
from tests.eval.eval_data import picture, write_questions

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def request(name: str, text: str, *images: bytes, **options: object) -> Request:
    content = (*([IMAGE] * len(images)), "\n" * bool(images) + text)
    return Request(id=name, messages=(Message(role="user", content=content),), images=images, **options)


def run_on(model: Model, task: Task, folder: Path) -> TaskResult:
    (result,) = evaluate(model, task, folder / "run", modes=("own",), baselines=(), settings=ONE)
    return result


@pytest.mark.parametrize("form", ["ours", "llava", "json", "tsv"])
def test_replay_reads_every_form_and_scores_like_the_model(form: str, question_file: Path, tmp_path: Path) -> None:
    answers = {f"q{n}": ("yes", "no", "blue", "green")[n % 4] for n in range(12)}
    path = tmp_path / {"ours": "a.jsonl", "llava": "b.jsonl", "json": "c.json", "tsv": "d.tsv"}[form]
    if form == "json":
        path.write_text(json.dumps(answers))
    elif form == "tsv":
        path.write_text("index\tprediction\n" + "".join(f"{k}\t{v}\n" for k, v in answers.items()))
    else:
        key = "id" if form == "ours" else "question_id"
        path.write_text("".join(json.dumps({key: k, "text": v}) + "\n" for k, v in answers.items()))
    task = get_task(f"llava:{question_file}")
    result = run_on(ReplayModel(path), task, tmp_path)
    assert result.score == 1.0
    assert result.counts.failed == 0


def test_replay_without_an_answer_counts_a_failure(question_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{n}", "text": "yes"}) + "\n" for n in range(11)))
    task = get_task(f"llava:{question_file}")
    result = run_on(ReplayModel(path), task, tmp_path)
    assert result.counts.failed == 1
    with pytest.raises(EvalError, match="row 1 is a question"):
        ReplayModel(question_file)


def test_replay_finds_ids_that_became_floats_and_names_ids_of_no_question(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = write_questions(tmp_path / "data", count=4)
    questions.write_text(questions.read_text().replace(': "q', ': "'))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question_id": float(n), "text": "yes"}) + "\n" for n in range(6)))
    model = ReplayModel(path)
    task = get_task(f"llava:{questions}")
    result = run_on(model, task, tmp_path)
    model.close()
    assert result.counts.failed == 0
    assert "2 of 6 answers belong to no question that was put: question_id is '4.0', '5.0'." in caplog.text


def mme_bench(folder: Path) -> str:
    """Two questions on each of two pictures, by VLMEvalKit's columns."""
    encoded = [base64.b64encode(picture(number)).decode() for number in (1, 2)]
    rows = ["index\tquestion\tanswer\tcategory\timage_path\timage"]
    for number in range(4):
        shown = number // 2
        question = f"Is it {('red', 'blue')[number % 2]}? Please answer yes or no."
        answer = ("Yes", "No")[number % 2]
        rows.append(f"{number}\t{question}\t{answer}\tcolor\t{shown}.png\t{encoded[shown]}")
    (folder / "MME.tsv").write_text("\n".join(rows) + "\n")
    (folder / "mme.yaml").write_text(
        "name: mme\nsource: {kind: tsv, path: MME.tsv}\nextraction: yes_no\nmetric: equal_ignore_case\n"
        'prompt: {template: "{question}{instruction}", remove: [" Please answer yes or no."], '
        'instruction: "\\nAnswer the question using a single word or phrase."}\n'
    )
    return str(folder / "mme.yaml")


SAID = ("Yes", "No", "Yes", "Yes")


def llava_mme(path: Path) -> None:
    """LLaVA's answer file of MME: the two questions on a picture have one id."""
    rows = [
        {"question_id": f"color/{number // 2}.png", "text": said,
         "prompt": f"Is it {('red', 'blue')[number % 2]}?\nAnswer the question using a single word or phrase."}
        for number, said in enumerate(SAID)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lmms_eval_samples(path: Path) -> None:
    """Samples of lmms-eval: named by the row's number, and within `doc` by the picture."""
    rows = [
        {"doc_id": number, "target": "yes", "doc": {"question_id": f"color/{number // 2}.png"},
         "arguments": [["Is it red?", {"max_new_tokens": 16}]], "resps": [[said]], "filtered_resps": [said.lower()]}
        for number, said in enumerate(SAID)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"


def workbook(path: Path) -> None:
    """A workbook as pandas writes it for VLMEvalKit: shared strings, numbers as numbers, no empty cells."""
    strings = ["index", "question", "prediction", *dict.fromkeys(SAID), "line_x000A_break"]
    shared = "".join(f"<si><t>{text}</t></si>" for text in strings)

    def cell(place: str, text: str) -> str:
        return f'<c r="{place}" t="s"><v>{strings.index(text)}</v></c>'

    lines = [f'<row r="1">{cell("A1", "index")}{cell("B1", "question")}{cell("C1", "prediction")}</row>']
    for number, said in enumerate(SAID):
        at = number + 2
        lines.append(f'<row r="{at}"><c r="A{at}"><v>{number}</v></c>{cell(f"C{at}", said)}</row>')
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/sharedStrings.xml", f'<sst xmlns="{SHEET}">{shared}</sst>')
        book.writestr(
            "xl/worksheets/sheet1.xml",
            f'<worksheet xmlns="{SHEET}"><sheetData>{"".join(lines)}</sheetData></worksheet>',
        )


@pytest.mark.parametrize(
    ("name", "write"), [("a.jsonl", llava_mme), ("b.jsonl", lmms_eval_samples), ("c.xlsx", workbook)]
)
def test_replay_reads_files_of_other_harnesses(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    task = get_task(mme_bench(tmp_path))
    write(tmp_path / name)
    model = ReplayModel(tmp_path / name)
    result = run_on(model, task, tmp_path)
    assert result.counts.failed == 0
    assert [row["text"] for row in read_samples(tmp_path / "run" / "mme@own" / "own")] == list(SAID)
    assert result.score == 0.75


def test_a_workbook_is_unpacked_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of a zip file may unpack to a gigabyte; the size in its header is not trusted."""
    monkeypatch.setattr("mm_moslora_eval.backends.replay_model._MOST_CELLS", 1 << 16)
    bomb = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("xl/worksheets/sheet1.xml", " " * (1 << 17))
    with pytest.raises(EvalError, match=r"bomb\.xlsx .* more than 65536 bytes"):
        ReplayModel(bomb)
    told = (1 << 17).to_bytes(4, "little")
    assert told in bomb.read_bytes()
    bomb.write_bytes(bomb.read_bytes().replace(told, (1 << 10).to_bytes(4, "little")))
    with pytest.raises(EvalError, match=r"bomb\.xlsx is no workbook"):
        ReplayModel(bomb)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.xlsx", b"no zip"), ("b.xlsx", None), ("c.jsonl", b'{"doc_id": 1, "resps": []}\n'), ("d.jsonl", b"[" * 99999),
     ("e.jsonl", b'{"id": "q", "text": "yes"}\n{"id": "q", "text": "no"}\n')],
)  # fmt: skip
def test_replay_refuses_unreadable_files(name: str, data: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if data is None:
        with zipfile.ZipFile(path, "w") as book:
            book.writestr("xl/worksheets/sheet1.xml", '<!DOCTYPE x [<!ENTITY a "aaaa">]><worksheet>&a;</worksheet>')
    else:
        path.write_bytes(data)
    with pytest.raises(EvalError, match=name):
        list(ReplayModel(path).generate([request("q", "yes or no?")], batch_size=1))


TURNS = (
    "{%% for m in messages %%}{{ '<' + m['role'] + '>' }}{%% if m.get('%s') %%}{{ '%s' + m['%s'] + '%s' }}{%% endif %%}"
    "{{ m['content'] + '\n' }}{%% endfor %%}{%% if add_generation_prompt %%}{{ '<assistant>%s' }}{%% endif %%}"
)
MARKED = ("[THINK]", "[/THINK]")


def written(key: str, opening: str, closing: str, *, prompt: str = "") -> str:
    return TURNS % (key, opening, key, closing, prompt)


@pytest.fixture(scope="module")
def tokenizer_of(language_folder: Path):
    def make(template: str | None, *, special: bool = True):
        made = AutoTokenizer.from_pretrained(language_folder)
        made.add_tokens([AddedToken(text, special=special) for text in MARKED], special_tokens=special)
        made.chat_template = template
        return made

    return make


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (written("reasoning_content", "[THINK]", "[/THINK]"), [MARKED]),
        (written("thinking", "\n[THINK]\n", "\n[/THINK]\n\n", prompt="\n[THINK]\n"), [MARKED]),  # the prompt opens it
        (written("reasoning", "|analysis|", "|end|<assistant>|final|"), [("|analysis|", "|end|<assistant>|final|")]),
        (written("reasoning", "", "\n"), []),
        (written("other", "[THINK]", "[/THINK]"), []),
        ("{{ raise_exception('no') }}", []),
        (None, []),
    ],
)
def test_markers_are_what_the_template_writes(template, expected, tokenizer_of) -> None:
    assert list(ReasoningMarkers.of_processor(tokenizer_of(template)).pairs) == expected


@pytest.mark.parametrize("special", [True, False])
def test_markers_stay_in_answers_that_scoring_reads_behind_them(special, tokenizer_of) -> None:
    tokenizer = tokenizer_of(written("thinking", *MARKED), special=special)
    markers = ReasoningMarkers(Template(tokenizer), tokenizer)
    said = tokenizer.encode("[THINK]red or blue?[/THINK]blue", add_special_tokens=False)
    text = markers.text([*said, tokenizer.eos_token_id], lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    assert text.startswith("[THINK]")
    assert "[/THINK]" in text
    assert tokenizer.eos_token not in text
    assert without_thinking(text, AnswerReasoning().all_markers(markers.pairs)).text == "blue"
    assert (markers.fingerprint("a") == "a") is not special


def test_local_models_and_those_of_transformers_name_their_markers(
    language_folder: Path, tmp_path: Path, tokenizer_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "thinks"
    shutil.copytree(language_folder, folder)
    tokenizer_of(written("reasoning_content", *MARKED)).save_pretrained(folder)
    model = open_model(f"hf:{folder}", precision="fp32")
    assert model.thinking_markers == (MARKED,)
    said = model._tokenizer.encode("[THINK]no[/THINK]yes", add_special_tokens=False)
    asked = Request(id="a", messages=(Message(role="user", content=("is it?",)),))
    assert without_thinking(model._answer(asked, said, None).text, model.thinking_markers).text == "yes"
