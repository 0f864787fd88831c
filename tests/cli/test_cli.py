"""The command line as a person meets it: help at once, one line per error, exit codes that tell."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from preloaded import Preloaded
from safetensors.torch import save_file
from trials import write

from mm_moslora.cli import run
from mm_moslora.config import Recipe, override_items
from mm_moslora.utils.errors import CheckpointError, ConfigError

CHECKOUT = Path(__file__).parents[2]


def command(python: Preloaded, *arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'eval'}"}
    return subprocess.run(
        [python.ours, "-m", "mm_moslora", *arguments], capture_output=True, text=True, timeout=240, env=environment,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(
    python: Preloaded,
    language_folder: Path,
    vision_folder: Path,
    records: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run trained through the command line, recipe file and overrides and all."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.yaml").write_text(
        f"""
model: {{language: {language_folder}, vision: {{name: {vision_folder}}}}}
adapter: {{rank: 4, alpha: 8}}
data: {{train: [{{path: {records}, image_folder: {records.parent / "images"}}}], max_length: 256}}
train: {{steps: 2, global_batch: 8, micro_batch: 4, zero: none, precision: fp32}}
track: {{trackers: []}}
"""
    )
    done = command(
        python, "train", str(folder / "recipe.yaml"), "--train.output", str(folder / "run"), "--optim.lr=1e-3"
    )
    assert done.returncode == 0, done.stderr
    assert "step 2 of 2" in done.stdout
    assert "mixer" in done.stderr
    return folder / "run"


def test_help_needs_no_heavy_library():
    code = "import sys; from mm_moslora.cli import run; run(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True).returncode == 0


def test_a_folder_that_is_not_there_is_told_before_anything_heavy_is_imported():
    verbs = [
        "chat X", "serve X", "chat X --web", "export X Y", "import X Y", "adapters inspect X",
        "eval run pope --model X", "train quickstart_tune --resume X", "compare X", "report X",
        "eval score X", "data check X",
    ]  # fmt: skip
    code = f"""
import sys
from mm_moslora.cli import run
codes = [run(words.replace("X", "nowhere").split()) for words in {verbs}]
sys.exit(codes != [1] * len(codes) or "torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nowhere") == done.stderr.count("error: ") == len(verbs), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quickstart_tun"], "Did you mean 'quickstart_tune'"),
        (["data", "check", "quickstart_tune", "--agianst", "x"], "No option --agianst. Keys of the recipe"),
        (["train", "quickstart_tune", "--optim.lrr", "1"], "unknown key 'optim.lrr'. Did you mean 'lr'"),
        (["train", "quickstart_tune", "--optim.lr"], "--optim.lr has no value"),
        (["train", "quickstart_tune", "quickly"], "'quickly' is no override"),
        (["export", "nowhere", "out"], "nowhere does not exist. Give the folder of a run"),
        (["chat", "nowhere", "--question", "hi"], "nowhere does not exist. Give the folder of a run"),
        (["launch", "quickstart_tune", "--nproc", "0"], "--nproc is 0, expected 1 or more"),
        (["launch", "quickstart_tune", "--nnodes", "2", "--rdzv", "x"], "expected HOST:PORT"),
        (["plan", "quickstart_tune", "--gpus", "8xFOO"], "'8xFOO' names no known GPU"),
        (["plan", "quickstart_tune", "--gpus", "0xA100-80G"], "'0xA100-80G' is not a list of GPUs"),
        (["plan", "quickstart_tune", "--gpus", "T4-16G", "--samples", "0"], "--samples is 0"),
        (["plan", "quickstart_tune", "--gpus", "T4-16G", "--samples", "9"], "one of them is missing"),
        (["plan", "quickstart_tune", "--gpus", "T4-16G", "--tokens-per-sample", "nan"], "--tokens-per-sample is nan"),
        (["plan", "quickstart_tune", "--gpus", "T4-16G", "--supervised", "3"], "--supervised is 3"),
        (["plan", "quickstart_tune", "--gpus", "T4-16G", "--price=-3"], "--price is -3"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_1(arguments, message, capsys):
    assert run(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "run", "out"], "mm-moslora export RUN OUT --to hf"),
        (["eval", "compare", "a", "b"], "mm-moslora eval table A B --paired"),
        (["trian"], 'Unknown command "trian". Did you mean "train"?'),
        (["train"], "mm-moslora train needs RECIPE. See mm-moslora train --help."),
        (["plan", "quickstart_tune"], "mm-moslora plan needs --gpus."),
        (["adapters", "inspect"], "mm-moslora adapters inspect needs FOLDER. See mm-moslora adapters inspect --help."),
        (["doctor", "--x"], "Unknown option: --x. See mm-moslora doctor --help."),
        (["serve", "x", "--port", "abc"], 'unable to convert "abc" into int. See mm-moslora serve --help.'),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["config"], ["eval", "list"]], ids=["kept for the end", "more than a buffer"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_and_a_full_disk_cost_no_traceback(words, unbuffered):
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'eval'}", "PYTHONUNBUFFERED": unbuffered}
    arguments = [sys.executable, "-m", "mm_moslora", *words]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(arguments, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: Writing failed: {os.strerror(errno.ENOSPC)}. Make room on its disk, or give a path on another.\n"
    )


def test_a_full_disk_on_the_way_out_does_not_hide_why_a_save_failed(monkeypatch, capsys):
    def refused(words, **_):
        try:
            raise CheckpointError("The checkpoint of step 7 could not be written.")
        finally:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/heartbeat")

    monkeypatch.setattr("mm_moslora_eval.eval_commands.list_tasks", refused)
    assert run(["eval", "list"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: The checkpoint of step 7 could not be written. Then: runs/heartbeat: No space left")
    assert "Give a path" not in told


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_that_a_writer_in_rust_finds_is_one_line(number, monkeypatch, capsys):
    def refused(words, **_):
        raise Exception(f"{os.strerror(number)} (os error {number})")  # as tokenizers and safetensors raise it

    monkeypatch.setattr("mm_moslora_eval.eval_commands.list_tasks", refused)
    assert run(["eval", "list"]) == 1
    told = f"error: Writing failed: {os.strerror(errno.ENOSPC)}. Make room on its disk, or give a path on another.\n"
    assert capsys.readouterr().err == told


def test_ctrl_c_is_told_and_is_exit_code_130(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("mm_moslora_eval.eval_commands.list_tasks", interrupted)
    assert run(["eval", "list"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_ctrl_c_while_the_command_line_is_imported_leaves_no_traceback(tmp_path):
    (tmp_path / "cyclopts.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{CHECKOUT}:{CHECKOUT / 'eval'}"}
    words = [sys.executable, "-m", "mm_moslora", "config"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, preexec_fn=_hear_ctrl_c)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def _hear_ctrl_c() -> None:
    """As on a terminal; what a shell starts with `&`, these tests perhaps, has Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_second_ctrl_c_while_the_interpreter_ends_is_quiet():
    code = """
import atexit, signal, sys, time
from mm_moslora import __main__, cli
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main = lambda: sys.exit(130)
atexit.register(lambda: (print("ends", flush=True), time.sleep(60)))
__main__.main()"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ends\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 130


@pytest.mark.parametrize(("number", "name", "code"), [(1, "SIGHUP", 129), (15, "SIGTERM", 143)])
def test_a_closed_terminal_ends_a_verb_after_it_has_cleaned_up(number, name, code, monkeypatch, capsys):
    cleaned = []

    def verb(*_: object, **options: object) -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)

    previous = signal.signal(number, signal.SIG_DFL)
    try:
        monkeypatch.setattr("mm_moslora.cli.cli_app.app", verb)
        assert run(["export"]) == code
        assert (cleaned, capsys.readouterr().err) == ([True], f"error: ended by {name}\n")
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # nohup
        assert run(["export"]) == 0
    finally:
        signal.signal(number, previous)


def test_the_list_of_tasks_takes_several_words(capsys):
    assert run(["eval", "list", "mmbench", "lmms_eval"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        ["mmbench_cn_dev", "lmms_eval"], ["mmbench_en_dev", "lmms_eval"],
    ]  # fmt: skip


def test_config_prints_a_recipe_that_it_reads_back(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["config"]) == 0
    assert "quickstart_tune" in capsys.readouterr().out.split()
    assert run(["config", "quickstart_tune", "--adapter.rank", "8"]) == 0
    text = capsys.readouterr().out
    Path("r.yaml").write_text(text)
    assert run(["config", "r.yaml"]) == 0
    assert capsys.readouterr().out == text
    assert "rank: 8" in text


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("train", "--train.micro_batch"), ("train.zero", "DeepSpeed preset"), ("data.train.0.path", "webdataset .tar"),
        ("name", "--objective"),
    ],
)  # fmt: skip
def test_a_key_in_place_of_a_recipe_is_explained(key, shown, capsys):
    assert run(["config", key]) == 0
    assert shown in capsys.readouterr().out
    assert run(["config", f"{key}x"]) == 1
    assert "neither a file nor a shipped recipe" in capsys.readouterr().err


def test_a_home_folder_behind_an_equals_sign_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("model: {language: x}\n")
    assert run(["config", "--recipe=~/r.yaml", "--train.output=~/runs/x"]) == 0
    assert f"output: {tmp_path}/runs/x\n" in capsys.readouterr().out


def test_overrides_in_all_spellings():
    tokens = ("--optim.lr", "1e-4", "--train.steps=5", "data.order=random")
    assert override_items(tokens) == ["optim.lr=1e-4", "train.steps=5", "data.order=random"]
    with pytest.raises(ConfigError, match="no override"):
        override_items(("x",))


@pytest.mark.slow
def test_chat_answers_one_question_about_a_picture(trained, records, capsys):
    picture = next((records.parent / "images").glob("*.png"))
    arguments = ["chat", str(trained), "--image", str(picture), "--question", "what is the color?"]
    assert run([*arguments, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.slow
def test_a_picture_that_is_not_there_is_told_before_the_model_is_opened(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")  # an export as far as its name goes
    assert run(["chat", str(tmp_path), "--image", "no.png"]) == 1
    assert capsys.readouterr().err == "error: There is no picture 'no.png'; --image takes the path of a file.\n"


def test_chat_in_the_terminal_survives_mistakes(python, trained, records):
    picture = next((records.parent / "images").glob("*.png"))
    lines = ["/image missing.png", "/imagine", f"/image {picture}", "what is the color?", "/reset", "/quit"]
    done = command(python, "chat", str(trained), "--max-new-tokens", "3", input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "missing.png" in done.stdout
    assert "Unknown command" in done.stdout


@pytest.mark.slow
def test_merge_and_export_write_folders_that_say_how_close_they_are(trained, tmp_path, capsys):
    assert run(["export", str(trained), str(tmp_path / "llava")]) == 0
    assert "LlavaForConditionalGeneration, largest logit difference" in capsys.readouterr().out
    assert run(["export", str(trained), str(tmp_path / "merged"), "--dtype", "bf16", "--to", "hf"]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert run(["export", str(trained), str(tmp_path / "lora"), "--to", "lora"]) == 0
    names = {"adapter_config.json", "moslora.safetensors", "base", "README.md", "tokenizer_config.json"}
    assert names <= {p.name for p in (tmp_path / "lora").iterdir()}
    capsys.readouterr()
    assert run(["export", str(trained), str(tmp_path / "llava")]) == 1
    assert "is not empty" in capsys.readouterr().err


STRANGER = """
import json, sys, torch
from peft import AutoPeftModel
from PIL import Image
from transformers import AutoProcessor
model = AutoPeftModel.from_pretrained(sys.argv[1]).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], backend="pil")
inputs = processor(images=Image.linear_gradient("L").convert("RGB"), text="<image>a red square", return_tensors="pt")
inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
with torch.no_grad():
    torch.save((dict(inputs), model(**inputs).logits), sys.argv[2])
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
print(type(model).__name__, type(model.get_base_model()).__name__, [name for name in sys.modules if "moslora" in name])
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_exported_adapter_loads_in_stock_peft_with_projector_and_base(dtype, trained, tmp_path, python):
    import torch

    from mm_moslora.models.load_model import load

    folder = tmp_path / "lora"
    assert run(["export", str(trained), str(folder), "--to", "lora", "--dtype", dtype]) == 0
    arguments = [str(python.stock), "-c", STRANGER, str(folder), str(tmp_path / "logits.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "PeftModel LlavaForConditionalGeneration []"
    inputs, stock = torch.load(tmp_path / "logits.pt", weights_only=False)
    live = load(trained, merge=False).model
    inputs["pixel_values"] = inputs["pixel_values"].to(live.dtype)
    with torch.no_grad():
        torch.testing.assert_close(stock.float(), live(**inputs).logits, atol=1e-5 if dtype == "fp32" else 0.05, rtol=0)
    assert "peft.AutoPeftModel.from_pretrained" in (folder / "README.md").read_text()
    moved = folder.rename(tmp_path / "moved")
    with torch.no_grad():  # ours finds the base wherever the folder was moved
        again = load(moved, merge=False).model(**inputs).logits
    torch.testing.assert_close(again, stock.float(), atol=1e-5 if dtype == "fp32" else 0.05, rtol=0)


@pytest.mark.slow
def test_inspect_shows_every_module_and_draws_a_picture(trained, tmp_path, capsys, monkeypatch):
    import matplotlib

    # As a `matplotlibrc` of the working folder would have it.
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(matplotlib.rcParams, "text.latex.preamble", r"\input{/etc/hostname}")
    adapter = trained / "checkpoint-000002" / "adapter"
    assert run(["adapters", "inspect", str(adapter), "--plot", str(tmp_path / "mixers.png")]) == 0
    assert capsys.readouterr().out.count("q_proj") == 2
    assert (tmp_path / "mixers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb",
    [
        "export RUN FILE/out --to lora", "adapters inspect RUN --plot FILE/out.png",
        "report RUN --output FILE/out", "report RUN --output /proc/nowhere/out",
        "train RUN/config.yaml --train.output FILE/out", "quickstart --output FILE/out",
    ],
)  # fmt: skip
def test_a_path_that_cannot_be_written_is_one_line_that_names_it(verb, trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = [word.replace("RUN", str(trained)).replace("FILE", str(tmp_path / "file")) for word in verb.split()]
    assert run(words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert ("/proc/nowhere" if "/proc" in verb else str(tmp_path / "file")) in error


def test_a_full_disk_is_one_line_and_a_fault_without_a_path_stays_whole(monkeypatch, capsys):
    def refuse(number: int) -> None:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("mm_moslora.config.load_recipe", fail)

    refuse(errno.ENOSPC)
    assert run(["config", "quickstart_tune"]) == 1
    assert "error: Writing failed: No space left on device." in capsys.readouterr().err
    refuse(errno.EBADF)
    with pytest.raises(OSError, match="Bad file descriptor"):
        run(["config", "quickstart_tune"])


@pytest.mark.slow
def test_data_view_takes_a_run_folder(trained, tmp_path, capsys):
    assert run(["data", "view", str(trained), "--count", "1"]) == 0
    assert "what is the color?" in capsys.readouterr().out
    assert run(["data", "view", str(tmp_path)]) == 1
    assert "a folder without config.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_report_of_a_run(trained, capsys):
    assert run(["report", str(trained)]) == 0
    assert (trained / "report.html").read_text().startswith("<!doctype html>")


def test_doctor_runs(capsys):
    assert run(["doctor"]) in (0, 1)
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({"data.train.0.path": "/gone/records.jsonl"}, "data"),
        ({"model.language": "/gone/model"}, "model"),
        ({"model.projector.weights": "/gone/run"}, "model"),
        ({"adapter.weights": "/gone/run"}, "model"),
        ({"train.zero": "/gone/zero.json"}, "deepspeed"),
        ({"model.language": "parts/none"}, "base"),
        ({"model.vision.name": "parts/none"}, "base"),
        ({"model.projector.weights": "{other}"}, "base"),
        ({"validate.tasks": "[none.yaml]", "train.validate_every": "1"}, "tasks"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_doctor_finds_what_train_refuses(overrides, found, recipe: Recipe, tmp_path, capsys):
    save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "projector.safetensors")
    values = {key: value.format(other=tmp_path / "projector.safetensors") for key, value in overrides.items()}
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    recipe = [str(write(recipe)), *words, "--train.output", str(tmp_path / "run")]
    assert run(["train", *recipe]) == 1
    said = capsys.readouterr().err.removeprefix("error: ").split()
    assert run(["doctor", *recipe]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["bad", found] for line in lines)
    assert set(said[1:4]) <= {word for line in lines for word in line.split()}


def test_mistakes_that_need_no_library_are_refused_before_one_is_imported(recipe: Recipe, tmp_path: Path) -> None:
    path = write(recipe)
    absent = f"--data.train.0.path={tmp_path / 'absent.json'}"
    lines = [
        ["data", "check", path, absent], ["data", "view", path, absent], ["data", "check", path, absent, "--stats"],
        ["doctor", "--model", "/absent"], ["compare", path], ["data", "check", "absent.yaml"],
    ]  # fmt: skip
    code = f"""
import sys
from mm_moslora.cli import run
for words in {lines!r}:
    assert run(words) == 1, words
    assert not {{"torch", "transformers", "datasets"}} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(lines)
