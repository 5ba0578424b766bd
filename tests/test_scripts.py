"""The scripts as a person meets them: help, misspelt options, missing data and stages, config files, paths, signals.

Cheap questions are put to a script within this process (its ``main`` through runpy); the whole pipeline, and what concerns
the process itself, runs as a person runs it, from the checkout's root and from the script's own folder.
"""

import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TEXTS, write_jsonl

FOLDERS = ("train", "tool", "inference")
SCRIPTS = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
SHORT = ["--block_size", "32", "--batch_size", "2", "--max_steps", "3", "--device", "cpu", "--precision", "fp32"]
TINY = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", *SHORT]


def with_commands(script: str) -> list[list[str]]:
    """How a script is called, before its options: once, or with each command that has options of its own."""
    if "parse_commands" not in (ROOT / script).read_text(encoding="utf-8"):
        return [[script]]
    return [[script, command] for command in runpy.run_path(str(ROOT / script))["COMMANDS"]]


@pytest.fixture(params=[call for script in SCRIPTS for call in with_commands(script)], ids=" ".join)
def script(request) -> list[str]:
    """The words of a command line, up to its options."""
    return request.param


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty workspace; the working directory is another, empty one."""
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("ETUDE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


@pytest.fixture
def call(home, monkeypatch, capsys):
    """``call("train/train_sft.py", *arguments)``: (exit code, standard output, standard error) of a script."""

    def call(script: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return call


def refused(answer: tuple[int, str, str], code: int, *pieces: str) -> None:
    """A person's mistake: this exit code, one line on standard error with these pieces, no traceback."""
    found, _, err = answer
    assert found == code, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for piece in pieces:
        assert piece in err, err


@pytest.fixture
def with_tokenizer(home, tokenizer_folder) -> Path:
    return shutil.copytree(tokenizer_folder, home / "weight" / "tokenizer")


@pytest.fixture
def with_model(home, tiny_model, tokenizer) -> Path:
    from etude.weights import save_model

    folder = home / "weight" / "etude_pretrained_model"
    save_model(tiny_model, folder)
    tokenizer.save(folder, max_length=64)
    return folder


def write_texts(path: Path) -> Path:
    return write_jsonl(path, ({"text": f"{number}. {TEXTS[number % len(TEXTS)]} {number * 7}"} for number in range(60)))


def write_chats(path: Path) -> Path:
    def chat(number: int) -> dict:
        said = (("user", f"{number} + 1?"), ("assistant", f"{number + 1}."))
        return {"conversations": [{"role": role, "content": content} for role, content in said]}

    return write_jsonl(path, map(chat, range(60)))


# ---- help and options ---------------------------------------------------------------------------------------------------

PROBE = """
import runpy, sys
sys.argv = sys.argv[1:] + ["--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "numpy", "tokenizers", "matplotlib", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_answers_at_once_without_torch_from_any_directory(script, tmp_path):
    file, *command = script
    for folder in (ROOT, (ROOT / file).parent, tmp_path)[:: 1 if file == "train/train_pretrain.py" else 3]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        path = os.path.relpath(ROOT / file, folder)
        done = subprocess.run(
            [sys.executable, "-c", PROBE, path, *command], cwd=folder, capture_output=True, text=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "--config" in done.stdout and "usage:" in done.stdout.lower()
        assert after.ru_utime - before.ru_utime < 3  # seconds of work, however busy the machine is
    assert os.listdir(tmp_path) == []


def options_of(help_text: str) -> set[str]:
    return set(re.findall(r"^ +--([a-z]\w*)", help_text, re.MULTILINE)) - {"config", "print_config", "help"}


def test_a_misspelt_option_is_refused_with_the_right_one(script, call):
    code, out, _ = call(*script, "--help")
    assert code == 0
    option = max(options_of(out), key=len)
    refused(call(*script, f"--{option[:-2]}{option[-1]}", "1"), 2, f"did you mean --{option}?")
    refused(call(*script, "--zzzzqqqq=1"), 2, "--zzzzqqqq", "see --help")


def test_an_abbreviation_is_no_option(call):
    refused(call("train/train_pretrain.py", "--learning", "1"), 2, "there is no option --learning")
    refused(call("train/train_pretrain.py", "--batch-size", "1"), 2, "did you mean --batch_size?")


@pytest.mark.parametrize(
    "arguments, piece",
    [
        (["--batch_size", "0"], "batch_size (0) must be at least 1"),
        (["--batch_size", "many"], "batch_size"),
        (["--learning_rate", "-1"], "learning_rate (-1.0) must be at least 0"),
        (["--learning_rate", "nan"], "learning_rate"),
        (["--precision", "fp4"], "precision"),
        (["--warmup_fraction", "1.5"], "warmup_fraction (1.5) must be between 0 and 1"),
        (
            ["--learning_rate", "0", "--head_learning_rate", "0.004"],
            "head_learning_rate (0.004) follows learning_rate, which is 0",
        ),
        (["--keep_checkpoints", "0"], "keep_checkpoints (0) must be at least 1"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["stray"], "stray"),
    ],
)
def test_a_value_that_cannot_work_is_a_usage_error(call, arguments, piece):
    refused(call("train/train_pretrain.py", *arguments), 2, piece)


def test_an_unknown_key_in_a_config_file_is_refused(call):
    Path("run.yaml").write_text("batch_size: 4\nlerning_rate: 0.1\n")
    refused(call("train/train_pretrain.py", "--config", "run.yaml"), 2, "lerning_rate")


def test_what_print_config_prints_config_takes_back(script, call):
    code, printed, _ = call(*script, "--print_config")
    assert code == 0
    values = yaml.safe_load(printed)
    assert options_of(call(*script, "--help")[1]) <= values.keys()
    changed = {key: value + 3 for key, value in values.items() if type(value) is int}
    Path("run.yaml").write_text(yaml.safe_dump({**values, **changed}, allow_unicode=True))
    code, again, _ = call(*script, "--config", "run.yaml", "--print_config")
    assert code == 0 and yaml.safe_load(again) == {**values, **changed}


def test_a_flag_overrides_the_config_file(call):
    scaling = "{rope_type: linear, factor: 2.0}"
    Path("run.yaml").write_text(f"batch_size: 4\nseed: 5\ndata: [a.jsonl, b.jsonl]\nrope_scaling: {scaling}\n")
    _, printed, _ = call("train/train_pretrain.py", "--config", "run.yaml", "--seed", "6", "--print_config")
    values = yaml.safe_load(printed)
    assert (values["batch_size"], values["seed"], values["data"]) == (4, 6, ["a.jsonl", "b.jsonl"])
    assert values["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


# ---- what is missing ----------------------------------------------------------------------------------------------------


def test_missing_stages_name_the_command_to_run(call, home):
    write_texts(home / "training_data/pretrain/pretrain_hq.jsonl")
    write_chats(home / "training_data/sft/sft_mini_512.jsonl")
    refused(call("train/train_tokenizer.py", "verify"), 78, "python train/train_tokenizer.py all")
    refused(call("train/train_pretrain.py"), 78, "python train/train_tokenizer.py all")
    refused(call("train/train_sft.py"), 78, "python train/train_pretrain.py")
    refused(call("inference/inference.py", "--prompt", "x"), 78, "python train/train_pretrain.py")
    refused(call("inference/hf.py", "--prompt", "x"), 78, "run: python ")
    refused(call("tool/convert_hf.py"), 78, "python train/train_sft.py")
    refused(call("tool/evaluate.py", "--text", home / "training_data"), 78, "etude_sft_model")
    assert not (home / "weight").exists()


def test_missing_data_is_named(call, home, with_tokenizer, with_model):
    data = home / "training_data"
    refused(call("train/train_tokenizer.py", "all"), 65, f"{data}/pretrain/pretrain_hq.jsonl: no such file")
    refused(call("train/train_pretrain.py"), 65, f"{data}/pretrain/pretrain_hq.jsonl: no such file")
    refused(call("train/train_sft.py", "--block_size", "32"), 65, f"{data}/sft/sft_mini_512.jsonl: no such file")
    refused(call("tool/evaluate.py", "--model", with_model, "--text", "nowhere.txt"), 65, "nowhere.txt: no such file")
    refused(call("tool/evaluate.py", "--model", with_model), 2, "nothing to measure")


def test_empty_or_bad_data_is_refused_with_its_place_before_anything_is_made(call, home, with_tokenizer, with_model):
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    Path("chat.jsonl").write_text('{"conversations": [{"role": "robot", "content": "x"}]}\n')
    refused(call("train/train_pretrain.py", *TINY, "--data", "empty.jsonl"), 65, "empty.jsonl")
    refused(call("train/train_pretrain.py", *TINY, "--data", "bad.jsonl"), 65, "bad.jsonl:2: not valid JSON")
    refused(call("train/train_sft.py", *SHORT, "--data", "chat.jsonl"), 65, "chat.jsonl:1: ", "robot")
    refused(call("train/train_tokenizer.py", "train", "--data", "bad.jsonl"), 65, "bad.jsonl:2")
    assert sorted(os.listdir(home / "weight")) == ["etude_pretrained_model", "tokenizer"]
    assert not [path for path in with_model.iterdir() if path.is_dir()]


def test_a_block_longer_than_the_context_is_refused(call, home, with_model):
    refused(call("train/train_sft.py", "--block_size", "100"), 2, "block_size (100)", "max_position_embeddings (64)")


# ---- where things go ----------------------------------------------------------------------------------------------------


def test_typed_paths_are_relative_to_where_one_stands_and_defaults_to_the_workspace(call, home):
    write_texts(Path("my.jsonl"))
    assert call("train/train_tokenizer.py", "train", "--data", "my.jsonl", "--output", "mine", "--vocab_size", "300")[0] == 0
    assert Path("mine/tokenizer.json").is_file() and os.listdir(home) == []
    here = sorted(os.listdir())
    write_texts(home / "training_data/pretrain/pretrain_hq.jsonl")
    assert call("train/train_tokenizer.py", "train", "--vocab_size", "300")[0] == 0
    assert call("train/train_pretrain.py", *TINY, "--sample_every", "0")[0] == 0
    run = home / "weight" / "etude_pretrained_model"
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "run.yaml", "metrics.jsonl",
                "loss.png", "best", "checkpoints"}  # fmt: skip
    assert set(os.listdir(run)) - {".lock"} == expected
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir()) == here and sorted(os.listdir(home)) == ["training_data", "weight"]
    code, out, _ = call("train/train_pretrain.py", "--config", run / "run.yaml")  # what a run saved, it takes back
    assert code == 0 and "complete  3 steps" in out and "step 1/" not in out
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line] == [3]


def test_a_refused_resume_is_a_mismatch_and_says_what_to_do(call, home, with_tokenizer):
    write_texts(home / "training_data/pretrain/pretrain_hq.jsonl")
    assert call("train/train_pretrain.py", *TINY, "--sample_every", "0")[0] == 0
    changed = ["train/train_pretrain.py", *TINY, "--sample_every", "0", "--seed", "1"]
    refused(call(*changed), 78, "seed 0 → 1", "--resume never", "--allow_mismatch")
    write_texts(home / "other.jsonl").write_text('{"text": "other"}\n' * 9)
    changed = ["train/train_pretrain.py", *TINY, "--sample_every", "0", "--data", home / "other.jsonl", "--val_fraction", "0"]
    refused(call(*changed), 78, "data ", "val_fraction 0.01 → 0.0")


def test_the_data_is_told_apart_by_what_it_says_not_by_its_name(call, home, with_tokenizer):
    """The same text under another name goes on; another text under the same name does not."""
    source = write_texts(home / "training_data/pretrain/pretrain_hq.jsonl")
    options = ["train/train_pretrain.py", *TINY, "--sample_every", "0"]
    assert call(*options)[0] == 0
    shutil.copy(source, "copy.jsonl")
    code, out, _ = call(*options, "--data", "copy.jsonl")
    assert code == 0 and "complete" in out
    source.write_text(source.read_text().replace("fox", "cat"))
    refused(call(*options), 78, "data ")


def test_fine_tuning_another_model_is_not_called_complete(call, home, with_model, tiny_config, tokenizer):
    """Pretrained on, or anew, in the same folder: the finished SFT run was of the old weights."""
    from etude.model.transformer import Etude
    from etude.weights import save_model

    write_chats(home / "training_data/sft/sft_mini_512.jsonl")
    assert call("train/train_sft.py", *SHORT, "--sample_every", "0")[0] == 0
    save_model(Etude(tiny_config), with_model)
    refused(call("train/train_sft.py", *SHORT, "--sample_every", "0"), 78, "init_from")


@pytest.mark.parametrize("where", ["a file", "below a file"])
@pytest.mark.parametrize(
    "command",
    [["tool/make_sample.py"], ["train/train_tokenizer.py", "train", "--vocab_size", "300"], ["train/train_pretrain.py", *TINY]],
    ids=lambda command: command[0],
)
def test_an_output_that_cannot_be_is_told_in_one_line(call, home, with_tokenizer, command, where):
    write_texts(home / "training_data/pretrain/pretrain_hq.jsonl")
    Path("file").write_text("precious")
    refused(call(*command, "--output", "file" if where == "a file" else "file/below"), 74, "file")
    assert Path("file").read_text() == "precious"


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written_is_told_in_one_line(call, home, with_tokenizer):
    write_texts(home / "training_data/pretrain/pretrain_hq.jsonl")
    Path("locked").mkdir(mode=0o555)
    refused(call("train/train_pretrain.py", *TINY, "--output", "locked/run"), 74, "locked")
    refused(call("train/train_tokenizer.py", "train", "--vocab_size", "300", "--output", "locked/run"), 74, "locked")
    source = home / "training_data/pretrain/pretrain_hq.jsonl"
    source.chmod(0)
    refused(call("train/train_tokenizer.py", "train", "--vocab_size", "300"), 74, source.name)


# ---- as processes -------------------------------------------------------------------------------------------------------


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "ETUDE_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}


def execute(home: Path, folder: str, script: str, *arguments: object, **keywords) -> subprocess.CompletedProcess:
    """Run a script from a folder of the checkout, by the path that one would type there."""
    path = os.path.relpath(ROOT / script, ROOT / folder)
    command = [sys.executable, path, *map(str, arguments)]
    keywords = {"timeout": 300, **({} if "input" in keywords else {"stdin": subprocess.DEVNULL}), **keywords}
    return subprocess.run(command, cwd=ROOT / folder, env=environment(home), capture_output=True, text=True, **keywords)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A workspace with a little of each kind of data."""
    home = tmp_path_factory.mktemp("workspace")
    write_texts(home / "training_data/pretrain/pretrain_hq.jsonl")
    write_chats(home / "training_data/sft/sft_mini_512.jsonl")
    write_chats(home / "training_data/eval/questions.jsonl")
    return home


@pytest.fixture(scope="module")
def pipeline(workspace) -> dict[str, subprocess.CompletedProcess]:
    """Every stage once, from its own folder or the root, with the defaults for all paths."""
    chat_sized = ["--block_size", "256"]
    evaluate = ["--questions", workspace / "training_data/eval/questions.jsonl", "--output", workspace / "found.json"]
    prompt = ["--prompt", "Hello", "--max_new_tokens", "24", "--seed", "1"]  # of a few random tokens all may be blank
    return {
        "tokenizer": execute(workspace, "train", "train/train_tokenizer.py", "all", "--vocab_size", "400"),
        "pretrain": execute(workspace, "train", "train/train_pretrain.py", *TINY, *chat_sized),
        "sft": execute(workspace, ".", "train/train_sft.py", *SHORT, *chat_sized),
        "evaluate": execute(workspace, "tool", "tool/evaluate.py", *evaluate),
        "convert": execute(workspace, ".", "tool/convert_hf.py"),
        "inference": execute(workspace, "inference", "inference/inference.py", *prompt),
        "hf": execute(workspace, ".", "inference/hf.py", *prompt),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "sft", "evaluate", "convert", "inference", "hf"])
def test_every_stage_follows_from_the_one_before_without_a_path(pipeline, stage):
    done = pipeline[stage]
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stdout.strip()


@pytest.mark.slow
def test_the_stages_fill_the_workspace(pipeline, workspace):
    folders = ["etude_pretrained_model", "etude_sft_model", "etude_sft_model_llama_format", "tokenizer"]
    assert sorted(os.listdir(workspace / "weight")) == folders
    assert sorted(os.listdir(workspace / "training_data")) == ["eval", "pretrain", "sft", "tokenized"]
    assert json.loads((workspace / "found.json").read_text())["questions"]["answers"]


@pytest.mark.slow
def test_every_stage_again_from_the_other_directory(pipeline, workspace):
    """Finished runs say so; the tokenizer's steps work one by one."""
    before = (workspace / "weight/etude_sft_model/model.safetensors").read_bytes()
    for stage, folder in (("pretrain", "."), ("sft", "train")):
        config = workspace / f"weight/etude_{'pretrained' if stage == 'pretrain' else 'sft'}_model/run.yaml"
        done = execute(workspace, folder, f"train/train_{stage}.py", "--config", config)
        assert done.returncode == 0 and "complete  3 steps" in done.stdout and "step 1/" not in done.stdout, done.stderr
    assert (workspace / "weight/etude_sft_model/model.safetensors").read_bytes() == before
    for command in ("config", "verify"):
        done = execute(workspace, ".", "train/train_tokenizer.py", command)
        assert done.returncode == 0, done.stderr
    done = execute(workspace, ".", "tool/evaluate.py", "--text", workspace / "training_data/pretrain")
    assert done.returncode == 0 and "bits/byte" in done.stdout, done.stderr
    done = execute(workspace, "tool", "tool/convert_hf.py", "--output", workspace / "again")
    assert done.returncode == 0 and (workspace / "again" / "config.json").is_file(), done.stderr
    done = execute(workspace, ".", "inference/inference.py", "complete", input="Once\n")
    assert done.returncode == 0, done.stderr
    done = execute(workspace, "inference", "inference/hf.py", "generate", input="Once\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_sample_is_the_same_bytes_from_any_directory(tmp_path):
    for name, folder in (("one", "."), ("two", "tool")):
        (tmp_path / name).mkdir()
        assert execute(tmp_path / name, folder, "tool/make_sample.py").returncode == 0
    for name in ("pretrain/pretrain_hq.jsonl", "sft/sft_mini_512.jsonl", "eval/questions.jsonl"):
        one, two = (tmp_path / home / "training_data" / name for home in ("one", "two"))
        assert one.read_bytes() == two.read_bytes() and one.stat().st_size > 10_000


LONG = [*TINY, "--block_size", "64", "--log_every", "1", "--eval_every", "7", "--save_every", "5", "--sample_every", "3",
        "--dropout", "0.1", "--val_fraction", "0.1"]  # fmt: skip
CONSTANT = ["--schedule", "wsd", "--warmup_fraction", "0", "--decay_fraction", "0"]  # but for the last step


def started(home: Path, output: Path, *arguments: str) -> subprocess.Popen:
    """A pretraining run that has taken some steps, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "train/train_pretrain.py", *LONG, "--output", output, *arguments],
        env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = output / "metrics.jsonl"
        if metrics.is_file() and metrics.read_text().count('"loss"') >= 3:
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.slow
@pytest.mark.parametrize("number, twice", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_run_asked_to_stop_saves_leaves_with_75_and_goes_on_exactly(pipeline, workspace, tmp_path, number, twice):
    process = started(workspace, tmp_path / "run", "--max_steps", "1000000", *CONSTANT)
    try:
        os.killpg(process.pid, number)
        if twice:
            time.sleep(0.001)
            os.killpg(process.pid, number)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 75, (out, err)
    assert re.search(r"error: stopped after step \d+ of 1000000, and saved", err) and "Traceback" not in err
    stopped_at = int(re.search(r"stopped after step (\d+)", err)[1])
    options = ["train/train_pretrain.py", *LONG, *CONSTANT, "--max_steps", stopped_at + 20, "--output"]
    done = execute(workspace, ".", *options, tmp_path / "run")
    assert done.returncode == 0 and f"step-{stopped_at:08d}" in done.stdout, done.stderr
    whole = execute(workspace, ".", *options, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for name in ("model.safetensors", "best/model.safetensors"):  # the rate was constant in both: one and the same run
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_full_disk_ends_with_74_and_the_run_goes_on_when_there_is_room(pipeline, workspace, tmp_path):
    arguments = [*LONG, "--max_steps", "6", "--save_every", "2", "--eval_every", "0", "--output", tmp_path / "run"]
    size = (workspace / "weight/etude_pretrained_model/checkpoints/step-00000003/optimizer.safetensors").stat().st_size

    def little_room() -> None:  # enough for the weights, not for the optimizer's state
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, size * 3 // 4))

    done = execute(workspace, ".", "train/train_pretrain.py", *arguments, preexec_fn=little_room)
    assert done.returncode == 74 and "optimizer.safetensors" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") == []
    done = execute(workspace, ".", "train/train_pretrain.py", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_script_asks_or_waits_without_a_terminal(pipeline, workspace):
    """With an end-less pipe for standard input, what needs no input ends all the same."""
    reader, writer = os.pipe()
    try:
        config = workspace / "weight/etude_sft_model/run.yaml"
        done = execute(workspace, ".", "train/train_sft.py", "--config", config, stdin=reader)
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 0


def test_an_evaluation_replaces_nothing_but_an_earlier_one(call, tmp_path):
    questions = write_jsonl(tmp_path / "questions.jsonl", [{"messages": []}])
    other = tmp_path / "other.json"
    other.write_text('{"mine": 1}')
    for output in (questions, other):
        before = output.read_bytes()
        code, _, told = call("tool/evaluate.py", "--questions", questions, "--output", output)
        assert code == 2 and "choose another --output" in told and output.read_bytes() == before
    other.write_text('{"model": "m"}')
    code, _, told = call("tool/evaluate.py", "--questions", questions, "--output", other)
    assert code == 78 and "choose another" not in told  # there is no model yet
