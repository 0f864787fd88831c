"""Groups and tags of tasks on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from mm_moslora_eval.eval_commands import list_tasks
from mm_moslora_eval.protocol.task_groups import SIGN, expanded, shipped_groups, with_protocol
from mm_moslora_eval.protocol.task_registry import all_tasks, get_task

from mm_moslora.utils.errors import ConfigError, EvalError


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
