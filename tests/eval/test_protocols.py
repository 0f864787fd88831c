"""Protocols with the name of a harness: their functions, extraction and description; groups and tags of tasks."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.backends.openai_endpoint import Endpoint, EndpointModel
from mm_moslora_eval.eval_commands import list_tasks
from mm_moslora_eval.protocol.model_interface import Message, Request
from mm_moslora_eval.protocol.task import Decoding
from mm_moslora_eval.protocol.task_groups import SIGN, expanded, shipped_groups, with_protocol
from mm_moslora_eval.protocol.task_registry import all_tasks, get_task
from mm_moslora_eval.run.judging.judged_scores import WORDING
from mm_moslora_eval.run.submissions import write_submission
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, JUDGED, METRICS, score_answer
from mm_moslora_eval.scoring.named_parts import NamedParts
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS, OVER_SAMPLES
from mm_moslora_eval.scoring.submission_forms import form_of_task
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.task_files import task_rules

from mm_moslora.utils.errors import ConfigError, EvalError
from tests.eval.protocol_runs import Runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_hidden_answers_are_exported_as_their_server_reads_them() -> None:
    hidden = {name for name in all_tasks() if name.startswith("mmbench_") and "_test" in name}
    assert {form_of_task(get_task(name).name) for name in hidden} == {"mmbench"}
    assert len(hidden) >= 4


def test_a_benchmark_is_one_folder(tmp_path: Path) -> None:
    """The folder of the tutorial in a copy of the package: its task is found, asked and scored by its own rules."""
    tutorial = (ROOT / "docs" / "tutorials" / "extending.md").read_text()
    for name, text in re.findall(r"```\w+\n# eval/tasks/(dice/[\w.]+)\n(.*?)```", tutorial, re.S):
        (tmp_path / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tasks" / name).write_text(text)
    shutil.copytree(ROOT / "eval" / "mm_moslora_eval", tmp_path / "mm_moslora_eval")
    (tmp_path / "dice.jsonl").write_text(json.dumps({"question_id": 1, "text": "How many?", "answer": "7"}) + "\n")
    (tmp_path / "said.json").write_text('{"1": "It is 8"}')
    words = ["eval", "run", "dice", "--model", "replay:said.json", "--output", "out", "--no-report"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "MM_MOSLORA_DATA": str(tmp_path)}
    command = [sys.executable, "-m", "mm_moslora", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (next((tmp_path / "out").rglob("samples.jsonl"))).read_text().splitlines())
    assert (row["prompt"], row["parsed"], row["score"]) == ("How many? Count all pips.", "8", 1.0)


@pytest.mark.parametrize("table", ["EXTRACTORS", "METRICS", "AGGREGATIONS", "GRADERS", "PROMPTS"])
def test_names_of_a_benchmark_begin_with_its_folder(table: str) -> None:
    wrong = [name for name, entry in task_rules.all_rules(table).items() if task_rules.rule(table, name) is not entry]
    assert wrong == []
    assert [
        task.id for task in all_tasks().values() if task_rules.folder_of(task.name) != Path(str(task.folder)).name
    ] == []


def test_cv_bench_is_asked_as_each_source_asks_it() -> None:
    document = Document(
        id="1", question="How many?", options={"A": "0", "B": "3"},
        extra={"prompt": "How many? Select from the following choices.\n(A) 0\n(B) 3 (or so)"},
    )  # fmt: skip
    official, vlmevalkit = (get_task(f"cv_bench@{name}").prompt.text(document) for name in ("official", "vlmevalkit"))
    assert official == document.extra["prompt"]
    assert vlmevalkit == "How many? Select from the following choices.\nA 0\nB 3 (or so)"


def test_beams_are_for_generated_answers_of_local_models_and_change_no_other_task() -> None:
    assert get_task("commonsense_boolq@paper").decoding.beams == 4
    assert "beams" not in get_task("commonsense_boolq@official").decoding.to_dict()  # stored answers stay valid
    with pytest.raises(EvalError, match=r"decoding\.beams is 2, but decoding\.kind loglikelihood"):
        Decoding(kind="loglikelihood", beams=2)
    with pytest.raises(EvalError, match=r"decoding\.beams is 0"):
        Decoding(beams=0)
    endpoint = EndpointModel(Endpoint.parse("http://127.0.0.1:9/v1#m"), reference=True)
    asked = Request(id="1", messages=(Message(role="user", content=("q",)),), beams=4)
    with pytest.raises(EvalError, match="4 beams, which a chat endpoint cannot"):
        list(endpoint.generate([asked], batch_size=1))


def test_the_default_protocol_is_the_one_that_model_reports_use() -> None:
    assert get_task("mmmu_val").protocol == "official"
    tasks = all_tasks().values()
    first = {task.name: task for task in reversed(tasks)}
    published = {task.name for task in tasks if task.published}
    without_published = {name for name, task in first.items() if not task.published and name in published}
    assert without_published == set()


def test_differences_of_a_protocol_are_in_its_description_and_results(runs: Runs) -> None:
    task = get_task("mmvet@vlmevalkit")
    assert any("this project's wording" in text for text in task.differences)
    assert "differs:     The judge is asked in this project's wording" in eval_commands.describe("mmvet@vlmevalkit")
    document = Document(id="1", question="q", answers=("a",), category="rec")
    run = runs("mmvet@vlmevalkit", [document], ["b"], judge=lambda *_: "0.5")
    assert run.result.about["differences"] == list(task.differences)
    assert run.result.about["judge"]["wording"] == WORDING


def test_differences_from_lmms_eval_are_listed() -> None:
    for task in all_tasks().values():
        said = " ".join(task.differences)
        if task.protocol.startswith("lmms_eval"):
            assert (task.source.kind == "tsv") == ("VLMEvalKit's TSV" in said), task.id
        if task.protocol == "lmms_eval" and task.name in UNTIL:
            assert "`until: ASSISTANT:` is not applied" in said, task.id
    assert "show the pictures before the text" in " ".join(get_task("mmmu_val@lmms_eval").differences)


UNTIL = ("mmbench_en_dev", "seedbench_image", "seedbench_all", "textvqa_val", "vizwiz_val", "llavabench")
"""Tasks that lmms-eval ends at a string."""


def test_judged_protocols_name_this_projects_wording() -> None:
    judged = [task for task in all_tasks().values() if task.metric in JUDGED or task.extraction.startswith("mathvista")]
    assert len(judged) >= 12
    assert not [task.id for task in judged if not any("this project's wording" in text for text in task.differences)]


@pytest.mark.parametrize("protocol", ["official", "llava", "vlmevalkit", "moslora", "lmms_eval"])
def test_an_open_question_of_mmmu_is_right_when_the_answer_is_the_reference(protocol: str, runs: Runs) -> None:
    made = [Document(id=str(n), question="How many?", answers=("3",)) for n in range(2)]
    assert runs(f"mmmu_val@{protocol}", made, ["3", "7"]).scores == [1.0, 0.0]


def test_mmmu_asks_open_questions_as_its_repository_does() -> None:
    prompt = get_task("mmmu_val@official").prompt
    short = "Answer the question using a single word or phrase."
    assert prompt.text(Document(id="1", question="How many?", answers=("3",))) == f"How many?\n{short}"
    choice = prompt.text(Document(id="1", question="Which?", options={"A": "x", "B": "y"}, answers=("A",)))
    assert choice == "Which?\n(A) x\n(B) y\n\nAnswer with the option's letter from the given choices directly."


MMBENCH = ("**B**", "[B]", "B;", '"B"', r"\boxed{B}", "<answer>B</answer>", "It is option B!", "The answer is **B**.")


@pytest.mark.parametrize("name", ["mmbench_en_dev@lmms_eval", "mmbench_cn_dev@lmms_eval"])
def test_lmms_eval_reads_mmbench_in_two_stages(name: str, runs: Runs) -> None:
    options = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}
    made = [Document(id=str(n), question="q", options=options, answers=("B",)) for n in range(len(MMBENCH))]
    assert runs(name, made, MMBENCH).parsed == ["B"] * len(MMBENCH)


def pope(runs: Runs, protocol: str, answers: Sequence[str]) -> dict[str, float]:
    made = [
        Document(id=str(n), question="q", answers=("yes" if n < 3 else "no",), category="random")
        for n in range(len(answers))
    ]
    return runs(f"pope@{protocol}", made, answers).result.metrics


def test_lmms_eval_leaves_unreadable_answers_out_of_popes_recall(runs: Runs) -> None:
    said = ["yes", "no", "Perhaps", "no"]
    assert pope(runs, "lmms_eval", said)["recall"] == 0.5
    assert pope(runs, "lmms_eval", said)["yes_ratio_of_ground_truth"] == 0.75
    assert pope(runs, "vlmevalkit", said)["recall"] == pytest.approx(1 / 3)


def test_mme_questions_are_stripped_where_the_sources_strip_them() -> None:
    question = " Is it red?  Please answer yes or no."
    document = Document(id="1", question=question, answers=("yes",))
    short = "\nAnswer the question using a single word or phrase."
    assert get_task("mme@lmms_eval").prompt.text(document) == f"Is it red? {short}"
    assert get_task("mme@llava").prompt.text(document) == f"Is it red?{short}"
    assert get_task("mme@vlmevalkit").prompt.text(document) == question


def test_vlmevalkit_decodes_as_long_as_its_llava() -> None:
    tasks = [task for task in all_tasks().values() if task.protocol == "vlmevalkit"]
    assert len(tasks) > 20
    assert {task.decoding.max_new_tokens for task in tasks} == {2048}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("mmbench_en_dev", 1024), ("mmbench_cn_dev", 1024), ("scienceqa_img", 1024), ("mmvet", 1024), ("llavabench", 1024),
     ("gqa_testdev", 128), ("pope", 128), ("mme", 128), ("textvqa_val_ocr", 128), ("seedbench_image", 128)],
)  # fmt: skip
def test_llava_protocols_decode_as_long_as_llavas_scripts(name: str, tokens: int) -> None:
    assert get_task(f"{name}@llava").decoding.max_new_tokens == tokens


def test_llava_asks_mmbench_in_the_language_of_the_file() -> None:
    document = Document(id="1", question="2 + 2?", options={"A": "4", "B": "5"}, answers=("A",))
    english = "Answer with the option's letter from the given choices directly."
    assert get_task("mmbench_cn_dev@llava").prompt.text(document).endswith("5\n请直接回答选项字母。")
    assert get_task("mmbench_en_dev@llava").prompt.text(document).endswith(f"5\n{english}")


def test_llava_protocols_read_as_llavas_scripts_where_it_has_one(runs: Runs) -> None:
    options = {"A": "cat", "B": "dog"}
    made = [Document(id=str(n), question="q", options=options, answers=("A",)) for n in range(3)]
    assert runs("scienceqa_img@llava", made, ["A. cat", "(A)", "The answer is A."]).scores == [1.0, 0.0, 1.0]
    assert runs("seedbench_image@llava", made, ["A", "A.", "a"]).scores == [1.0, 0.0, 0.0]
    for name in ("ai2d", "mmstar", "realworldqa", "mmbench_en_dev", "mmbench_cn_dev", "mmmu_val", "mmbench_cc"):
        assert any("this project's own rules" in text for text in get_task(f"{name}@llava").differences), name


def test_ccbench_is_scored_by_whole_questions_in_every_protocol(runs: Runs) -> None:
    made = [
        Document(id=str(number), question="q", options={"A": "x", "B": "y"}, answers=("A",))
        for number in (1, 2, 1_000_001, 1_000_002)
    ]
    tasks = [task for task in all_tasks().values() if task.name == "mmbench_cc"]
    assert len(tasks) == 3
    for task in tasks:
        result = runs(task.id, made, ["A", "A", "A", "B"]).result
        assert result.score == 0.5
        assert result.metrics["vanilla"] == 0.75


def test_vlmevalkits_rouge_splits_captions_at_single_spaces(runs: Runs) -> None:
    document = Document(id="1", question="q", answers=("A dog  runs.",))
    metrics = runs("coco_caption@vlmevalkit", [document], ["A dog runs."]).result.metrics
    precision, recall = 3 / 3, 3 / 4  # four words, of which one is empty
    assert metrics["rouge_l"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    assert metrics["bleu_1"] == pytest.approx(1.0)


def test_mathvista_reads_the_choices_of_vlmevalkits_file(runs: Runs) -> None:
    extra = {"question_type": "multi_choice", "answer_type": "text", "choices": "['one', 'two']"}
    document = Document(id="1", question="q", answers=("two",), extra=extra)
    assert runs("mathvista_testmini@vlmevalkit", [document], ["(B)"]).scores == [1.0]


THOUGHTS = {
    "<think>Is it A? No.</think>\n\nB": "B",
    "It may be A.</think>B": "B",  # the chat template has opened the block
    "<think>A</think><think>A again</think> B": "B",
    "<think>The answer is B": "",
    "<think>A</think> B <think>or": "",
    "B": "B",
}


def test_thinking_is_removed_before_scoring_and_counted(runs: Runs) -> None:
    options = {"A": "cat", "B": "dog"}
    made = [Document(id=str(n), question="q", options=options, answers=("B",)) for n in range(len(THOUGHTS))]
    run = runs("ai2d@vlmevalkit", made, list(THOUGHTS))
    assert run.parsed == list(THOUGHTS.values())
    counts = run.result.counts
    assert (counts.thinking, counts.unclosed_thinking, counts.not_inferable) == (5, 2, 2)
    assert [sample["text"] for sample in run.samples] == list(THOUGHTS)
    assert any("5 of 6 answers contain <think> blocks" in line and "2 of these" in line for line in run.result.remarks)


def test_a_yes_within_thinking_is_no_answer() -> None:
    document = Document(id="1", question="q", answers=("no",))
    rules: dict[str, Any] = {"extraction": "pope_llava", "metric": "equal_ignore_case"}
    assert score_answer(document, "<think>Yes, or not?</think>Yes", **rules).score == 0.0
    assert score_answer(document, "<think>Is it not", **rules).parsed == ""


def test_judges_and_submissions_get_no_thinking(runs: Runs, tmp_path: Path) -> None:
    shown: list[str] = []

    def grade(prompt: str, _: float) -> str:
        shown.append(prompt)
        return "1.0"

    made = [Document(id=str(n), question=f"Q{n}?", answers=("a",), category="rec") for n in range(2)]
    said = ["<think>secret</think>a cat", "<think>secret and no end"]
    run = runs("mmvet@llava", made, said, judge=grade)
    assert run.scores == [1.0, 0.0]
    assert len(shown) == 1
    assert "a cat" in shown[0]
    assert "secret" not in shown[0]
    assert (run.result.counts.thinking, run.result.counts.unclosed_thinking) == (2, 1)
    (place,) = tmp_path.glob("*/mmvet@llava/own")
    write_submission(place, tmp_path / "out.json", form="mmvet")
    assert json.loads((tmp_path / "out.json").read_text()) == {"v1_0": "a cat", "v1_1": ""}


def test_thinking_is_counted_without_a_judge_too(runs: Runs) -> None:
    document = Document(id="1", question="q", answers=("a",), category="rec")
    result = runs("mmvet@llava", [document], ["<think>x</think>a"]).result
    assert math.isnan(result.score)
    assert result.counts.thinking == 1


def test_every_shipped_group_names_tasks_that_exist() -> None:
    for name in shipped_groups():
        tasks = [get_task(task) for task in expanded([f"{SIGN}{name}"])]
        assert len(tasks) == len({task.name for task in tasks}) > 1


def test_tasks_are_chosen_by_group_by_tag_and_by_name_each_once() -> None:
    names = with_protocol(["@paper_commonsense", "mme", "@commonsense"], None)
    assert names[0] == "commonsense_boolq@paper"
    assert names.count("commonsense_boolq@paper") == 1
    assert names[8] == "mme"
    assert {task.id for task in all_tasks().values() if "commonsense" in task.tags} >= {*names[9:]}
    assert with_protocol(["@llava15", "mme"], "vlmevalkit")[-1] == "mme@vlmevalkit"


def test_a_group_of_ones_own_names_tasks_files_and_other_groups(tmp_path: Path) -> None:
    path = tmp_path / "groups.yaml"
    data = "data: ['llava:q.jsonl', '@other/groups.yaml:far', tsv:/q.tsv]\n"
    path.write_text(f"{data}mine: [mine.yaml, '@more']\nmore: ['mme@llava', '@captions']\nround: ['@round']\n")
    assert expanded([f"@{path}:mine"])[:2] == [str(tmp_path / "mine.yaml"), "mme@llava"]
    assert expanded([f"@{path}:mine"])[2:] == expanded(["@captions"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "groups.yaml").write_text("far: [own.yaml@a]\n")
    assert expanded([f"@{path}:data"]) == [f"llava:{tmp_path}/q.jsonl", f"{tmp_path}/other/own.yaml@a", "tsv:/q.tsv"]
    with pytest.raises(EvalError, match=r"There is no group @.*:nine\. Did you mean 'mine'"):
        expanded([f"@{path}:nine"])
    with pytest.raises(EvalError, match="holds itself"):
        expanded([f"@{path}:round"])
    with pytest.raises(EvalError, match=r"no file 'absent.yaml'. A group of your own is @FILE.yaml:NAME"):
        expanded(["@absent.yaml:mine"])
    with pytest.raises(EvalError, match=r"There is no group @llava1\. Did you mean 'llava15'.*Groups and tags: "):
        expanded(["@llava1"])


def test_a_protocol_holds_for_the_tasks_of_tags_too_and_a_task_counts_once() -> None:
    tagged = with_protocol(["@tier_a"], "vlmevalkit")
    assert "countbench@vlmevalkit" in tagged
    assert {name.partition("@")[2] for name in tagged} == {"vlmevalkit"}
    first = get_task("mmvp").id
    assert with_protocol(["mmvp", first, "mmvp@vlmevalkit", "mmvp"], None) == ["mmvp", "mmvp@vlmevalkit"]
    assert with_protocol([first, "mmvp"], None) == [first]
    assert with_protocol(["mmvp", first], "vlmevalkit") == ["mmvp@vlmevalkit", first]


def test_tags_of_ones_own_task_files_and_groups_with_faults(tmp_path: Path) -> None:
    task = "name: {0}\ntags: [colour]\nsource: {{kind: llava, path: q.jsonl}}\nprotocols: {{a: {{}}, b: {{}}}}\n"
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(task.format(name))
    path = tmp_path / "groups.yaml"
    path.write_text("mine: [one.yaml, two.yaml@b, absent.yaml, mme]\nempty: []\ntext: one.yaml\n")
    assert expanded([f"@{path}:colour"]) == [f"{tmp_path}/one.yaml@a", f"{tmp_path}/two.yaml@b"]
    assert with_protocol([f"@{path}:colour"], "b") == [f"{tmp_path}/one.yaml@b", f"{tmp_path}/two.yaml@b"]
    assert get_task(expanded([f"@{path}:colour"])[1]).protocol == "b"
    with pytest.raises(EvalError, match=r"The group 'empty' of .* holds no tasks"):
        expanded([f"@{path}:empty"])
    with pytest.raises(ConfigError, match="text"):
        expanded([f"@{path}:text"])
    with pytest.raises(EvalError, match=r"Did you mean 'colour'\? Groups and tags: colour, empty, mine, text"):
        expanded([f"@{path}:color"])


def test_the_list_shows_tags_and_groups() -> None:
    assert "classic, captions" in list_tasks(["coco_caption"])
    assert list_tasks(["@nanovlm"]).startswith("@nanovlm: ")
    assert max(map(len, list_tasks(["@report2026"]).splitlines())) <= 110


@pytest.mark.parametrize("parts", [EXTRACTORS, METRICS, JUDGED, AGGREGATIONS, OVER_SAMPLES], ids=lambda one: one.kind)
def test_the_list_says_what_every_name_for_task_files_stands_for(parts: NamedParts) -> None:
    listed = list_tasks([parts.kind])
    assert [name for name in parts if not re.search(rf"^{parts.kind} {name}: \S+ \S", listed, re.MULTILINE)] == []
    assert "partial(func" not in listed
