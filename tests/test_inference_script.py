"""inference/inference.py as a person meets it: one prompt, a pipe, a terminal, a file, and what is said when it cannot work."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from etude import cli
from etude.generation.text import TextModel, load
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.tokenizer import SPECIAL_TOKENS, train_tokenizer
from etude.weights import save_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "inference" / "inference.py"
CONTEXT = 96
FEW = ("--seed", "1", "--max_new_tokens", "6")

spec = importlib.util.spec_from_file_location("inference_script", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # dataclasses look their module up
spec.loader.exec_module(script)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A workspace with a fine-tuned model in it, which says printable letters and hardly ever ends by itself."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "weight" / "etude_sft_model"
    tokenizer = train_tokenizer(["The fox lives in the forest. 狐狸住在森林里。"] * 3, folder, 280)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}
    model = Etude(EtudeConfig(300, max_position_embeddings=CONTEXT, initializer_range=0.4, **shape))
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0
        for token in range(len(tokenizer)):
            if not tokenizer.token_bytes(token).decode("utf-8", "replace").isalpha():
                model.lm_head.weight[token] = 0
    save_model(model, folder)
    return home


@pytest.fixture(scope="module")
def model(home) -> TextModel:
    return load(home / "weight" / "etude_sft_model", "cpu")


class Stdin(io.TextIOWrapper):
    """A pipe, or a terminal."""

    def __init__(self, typed: bytes, terminal: bool):
        super().__init__(io.BytesIO(typed), encoding="utf-8")
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def run(home, monkeypatch, capsys):
    """Run the script in this process: (exit code, standard output, standard error)."""

    def run(*arguments, typed: str | bytes = b"", terminal: bool = False):
        typed = typed.encode() if isinstance(typed, str) else typed
        monkeypatch.setenv("ETUDE_HOME", str(home))
        monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", Stdin(typed, terminal))
        with pytest.raises(SystemExit) as exit:
            cli.run(script.main)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return exit.value.code, out, err

    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- a fresh process -------------------------------------------------------------------------------------------------


def test_help_needs_no_torch():
    program = (
        "import runpy, sys, atexit\n"
        "atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else 'light'))\n"
        f"sys.argv = ['inference.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and done.stdout.endswith("light\n")
    assert "--temperature" in done.stdout and "{chat,complete}" in done.stdout


def test_from_another_folder_through_a_pipe(home, model, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ETUDE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *FEW],
        input="狐狸?\n".encode(),
        capture_output=True,
        timeout=120,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == model.chat("狐狸?", seed=1, max_new_tokens=6) + "\n"


# --- prompts, pipes and terminals ------------------------------------------------------------------------------------


def test_one_prompt(run, model):
    code, out, err = run("--prompt", "Hi", *FEW)
    assert (code, out) == (0, model.chat("Hi", seed=1, max_new_tokens=6) + "\n")
    assert "etude_sft_model" in err and "[the answer is cut" in err
    code, out, _ = run("complete", "--prompt", "The fox", *FEW)
    assert (code, out) == (0, model.complete("The fox", seed=1, max_new_tokens=6) + "\n")
    code, out, _ = run("complete", "--prompt", "", *FEW)
    assert (code, out) == (0, model.complete("", seed=1, max_new_tokens=6) + "\n")
    code, out, _ = run("chat", "--system", "Be brief.", "--prompt", "Hi", *FEW)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (code, out) == (0, model.chat(messages, seed=1, max_new_tokens=6) + "\n")


def test_stop_strings(run, model):
    whole = model.complete("The fox", temperature=0, max_new_tokens=30)
    stop = whole[6:9]
    code, out, err = run(
        "complete", "--prompt", "The fox", "--temperature", "0", "--max_new_tokens", "30", "--stop", "zzzz", stop
    )
    assert (code, out) == (0, whole[: whole.find(stop)] + "\n") and "[the answer is cut" not in err


def test_a_conversation_is_remembered_until_cleared(run, model):
    settings = {"seed": 1, "max_new_tokens": 6}
    code, out, err = run(*FEW, typed="Hi\n\nAnd?\nclear\nHi\nexit\nnever asked\n")
    first = model.chat("Hi", **settings)
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first}, {"role": "user", "content": "And?"}]
    assert (code, out) == (0, "\n".join([first, model.chat(history, **settings), first]) + "\n")
    assert "[cleared]" in err


def test_texts_to_complete_are_not_a_conversation(run, model):
    code, out, _ = run("complete", *FEW, typed="The fox\n狐狸\n")
    expected = [model.complete(text, seed=1, max_new_tokens=6) for text in ("The fox", "狐狸")]
    assert (code, out) == (0, "\n".join(expected) + "\n")


def test_the_oldest_turns_are_forgotten_with_a_notice(run, model):
    code, out, err = run(*FEW, typed="one one one\ntwo two two\nthree three\nfour four\nfive five\n")
    assert code == 0 and len(out.splitlines()) == 5
    assert f"[the context of {CONTEXT} tokens is full; turns forgotten, oldest first: 1]" in err
    assert out.splitlines()[0] == model.chat("one one one", seed=1, max_new_tokens=6)


def test_a_question_too_long(run):
    code, out, err = run(*FEW, typed="fox! " * 60 + "\n")
    assert code == 2 and out == "" and "error: the question takes" in err
    code, out, err = run(*FEW, typed="fox! " * 60 + "\nHi\n", terminal=True)  # a person may try again
    assert code == 0 and "error: the question takes" in err and out.strip("> \n")


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(run, model, monkeypatch):
    stream, seen = TextModel.stream_chat, []

    def interrupted(self, messages, **options):
        seen.append(messages)
        pieces = stream(self, messages, **options)
        yield next(pieces)
        if len(seen) == 1:
            raise KeyboardInterrupt
        return (yield from pieces)

    monkeypatch.setattr(TextModel, "stream_chat", interrupted)
    code, out, err = run(*FEW, typed="Hi\nAgain\n", terminal=True)
    assert code == 0 and "[stopped]" in err
    shown = seen[1][1]["content"]
    assert seen[1][0]["content"] == "Hi" and shown and shown in out  # what was shown of it stays in the conversation
    seen.clear()
    code, out, _ = run(*FEW, typed="Hi\nAgain\n")  # nobody is there to go on typing
    assert code == 130 and len(seen) == 1
    seen.clear()
    code, out, _ = run(*FEW, "--prompt", "Hi", terminal=True)
    assert code == 130


def test_ctrl_c_at_the_prompt_leaves(run, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(*FEW, terminal=True)[:2] == (0, "\n")


def test_nothing_to_answer_is_no_success(run):
    code, _, err = run(*FEW, typed="\n\n")
    assert code == 65 and "standard input: nothing to answer" in err


def test_standard_input_must_be_utf8(run):
    code, _, err = run(*FEW, typed="狐狸\n".encode("gbk"))
    assert code == 65 and "standard input: not UTF-8" in err


# --- files of prompts ------------------------------------------------------------------------------------------------


def test_a_file_of_prompts(run, model, tmp_path):
    questions = ["Hi", "Where does the fox live?", "狐狸住在哪里?"]
    prompts, output = tmp_path / "prompts.txt", tmp_path / "new" / "answers.jsonl"
    prompts.write_text("\n".join([questions[0], "", *questions[1:]]), encoding="utf-8")
    expected = [
        {"prompt": question, "text": text, "finish_reason": "length"}
        for question, text in zip(questions, model.chat(questions, seed=1, max_new_tokens=6), strict=True)
    ]
    for batch_size in (1, 2, 8):  # answers depend on the seed and the place, not on the batch
        code, out, err = run("--input", prompts, "--output", output, "--batch_size", batch_size, *FEW)
        assert (code, out) == (0, "") and "3 of 3 answered" in err
        assert lines(output) == expected
    code, out, _ = run("--input", prompts, *FEW)
    assert [json.loads(line) for line in out.splitlines()] == expected
    code, out, _ = run("complete", "--input", prompts, *FEW)
    assert [json.loads(line)["text"] for line in out.splitlines()] == model.complete(questions, seed=1, max_new_tokens=6)


def test_a_file_of_conversations(run, model, tmp_path):
    """Prompts, open conversations and answered ones, whose last reply is kept beside the new one."""
    question = {"role": "user", "content": "Hi"}
    records = [
        {"prompt": "Hi"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": [{"role": "system", "content": "Be brief."}, question], "skill": "greeting"},
    ]
    path, output = tmp_path / "chats.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run("chat", "--input", path, "--output", output, *FEW)[0] == 0
    found = lines(output)
    texts = model.chat([[question], [question], records[2]["messages"]], seed=1, max_new_tokens=6)
    assert [record.pop("text") for record in found] == texts
    assert [record.pop("finish_reason") for record in found] == ["length"] * 3
    assert found == records


@pytest.mark.parametrize(
    "command, line, problem",
    [
        ("chat", '{"prompt": 5}', "no text under the key 'prompt'"),
        ("chat", '{"prompt": "Hi"', "not valid JSON"),
        ("chat", '{"messages": [{"role": "root", "content": "Hi"}]}', "unknown role 'root'"),
        ("chat", '{"messages": [{"role": "assistant", "content": "Hi"}]}', "the conversation is empty"),
        ("complete", '{"text": "Hi"}', "no text under the key 'prompt' (found: text)"),
        ("complete", '{"prompt": "half \\ud83d"}', "half of a character"),
        ("chat", json.dumps({"prompt": "fox! " * 100}), f"the model's context holds {CONTEXT}"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_answered(run, tmp_path, command, line, problem):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "Hi"}\n' + line + "\n")
    code, _, err = run(command, "--input", path, "--output", output, *FEW)
    assert code == 65 and f"error: {path}:2: " in err and problem in err and not output.exists()


def test_an_empty_file_is_no_success(run, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    code, _, err = run("--input", tmp_path / "empty.txt")
    assert code == 65 and "no prompts in it" in err
    code, _, err = run("--input", tmp_path / "absent.txt")
    assert code == 65 and "no such file" in err


# --- what cannot work ------------------------------------------------------------------------------------------------


def test_a_missing_model_names_the_command_to_run(run, home, tmp_path, monkeypatch):
    code, _, err = run("--model", tmp_path / "nowhere", "--prompt", "Hi")
    assert code == 78 and "nowhere: there is no model here; run: python train/train_pretrain.py" in err and err.count("\n") == 1
    assert script.newest_model() == str(home / "weight" / "etude_sft_model")
    monkeypatch.setenv("ETUDE_HOME", str(tmp_path))
    assert script.newest_model() == str(tmp_path / "weight" / "etude_pretrained_model")


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("--temperature", "-1"), "temperature (-1.0) must be at least 0.001, or 0"),
        (("--top_p", "0"), "top_p (0.0) must be greater than 0"),
        (("--batch_size", "0"), "batch_size (0) must be at least 1"),
        (("--prompt", "a", "--input", "b.txt"), "--prompt and --input were both given"),
        (("--output", "b.txt"), "--output holds the answers to --input"),
        (("--input", "b.txt", "--output", "./b.txt"), "would overwrite --input"),
        (("complete", "--system", "a"), "--system belongs to chat"),
        (("--prompt", "a", "--stop", ""), "stop ('') must be at least one character"),
        (("--prompt", "a", "--device", "abacus"), "device (abacus)"),
        (("--temprature", "1"), "did you mean --temperature?"),
        (("talk",), "talk"),
    ],
)
def test_usage_errors_are_one_line(run, arguments, problem):
    code, _, err = run(*arguments)
    assert code == 2 and problem in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
