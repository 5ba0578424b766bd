"""Told to stop, at any moment and more than once, a run saves, leaves in time and ends as if it had not been told.

A moment is the call of a function of the package, counted from the first: every time the same one, so a failure can be seen
again. Which phase of a run it lies in is read from the stacks of an undisturbed run.
"""

import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT
from test_scripts import environment, write_texts
from test_trainer import STEPS, assert_same, in_child, make, metrics, no_waiting, one_thread, outcome  # noqa: F401

import etude
from etude import cli
from etude.training import checkpoint, start
from etude.training.signals import StopSignals

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="forks, and sends signals that Windows does not have")
PACKAGE = str(Path(etude.__file__).parent)
SEED = 16
SECONDS = 10  # what a run may take to save and leave


@pytest.fixture(autouse=True)
def hang_up_ends():
    """Under nohup the tests' processes would ignore it."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.fixture
def train(make, tokenizer, monkeypatch):  # noqa: F811
    """``train("name")``: a run with dropout, accumulation, validation, samples and saves, as a stage's script makes it."""
    monkeypatch.setattr(start, "SAMPLE_TOKENS", 4)

    def train(name: str, **options) -> None:
        run = make(name, sample_every=2, **options)
        run.sample = start.continuation_sample(tokenizer, "T", None)
        run.run()

    return train


def as_script(body) -> None:
    """``body`` as a script's main function: ends this process with the exit code that the script would have."""
    code = 99
    try:
        cli.run(body)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        os._exit(code)


def finish(train, path: Path, reference: dict) -> None:
    """Go on, to the end, and compare."""
    pending = (newest := checkpoint.newest_good(path)) is not None and newest.step == STEPS
    train(path.name)
    # The last step's checkpoint is not written again for the validation that came after it.
    assert_same(path, {**reference, "state": outcome(path)["state"]} if pending else reference)


# ---- at any moment ------------------------------------------------------------------------------------------------------

PHASES = {  # by a function that is on the stack
    "evaluate_loss": "validating",
    "generate": "sampling",
    "Trainer._save": "saving",
    "causal_lm_loss": "in a micro-batch",
    "Trainer.optimizer_step": "in a step",
}


def at_each_call(note) -> None:
    """From now on, call ``note(number, frame)`` whenever this thread calls a function of the package."""
    count = 0

    def watch(frame, event: str, _) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            count += 1
            note(count, frame)

    sys.setprofile(watch)


class Calls:
    """The calls of an undisturbed run, which is left in ``path``."""

    def __init__(self, train, path: Path):
        train(path.name)  # first, so that what is imported or remembered once is there already
        stacks = path.with_suffix(".json")

        def body():
            found: list[list[str]] = []
            at_each_call(lambda number, frame: found.append(_stack(frame)))
            train(f"{path.name} counted")
            sys.setprofile(None)
            stacks.write_text(json.dumps(found))

        assert in_child(lambda: as_script(body)) == 0
        self.callers, self.phases, self.steps = [], [], []  # of each call: who calls, the phase, the steps begun until then
        steps, phase_outside = 0, "starting"
        for names in json.loads(stacks.read_text()):
            steps += names[0] == "Trainer.optimizer_step"
            inside = [phase for name, phase in PHASES.items() if name in names]
            if inside == ["in a step"] and steps == 1:
                inside = ["in the first step"]
            self.phases.append(inside[0] if phase_outside == "between steps" and inside else phase_outside)
            self.steps.append(steps)
            self.callers.append(names[1:2])
            after = {"StopSignals.__enter__": "between steps", "StopSignals.__exit__": "ending"}
            phase_outside = after.get(names[0], phase_outside)

    def draw(self, source: random.Random, count: int) -> list[int]:
        """``count`` random moments, of each phase as many: numbers of calls."""
        phases = sorted(set(self.phases))
        assert phases == sorted({*PHASES.values(), "in the first step", "starting", "between steps", "ending"})
        return [
            source.choice([number for number, phase in enumerate(self.phases, 1) if phase == phases[index % len(phases)]])
            for index in range(count)
        ]


def _stack(frame) -> list[str]:
    names = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return names


def stopped_at(train, name: str, moments: list[int], number: int) -> int:
    """Run in a child that is sent a signal at each of these calls; its exit code."""

    def body():
        at_each_call(lambda count, frame: count in moments and os.kill(os.getpid(), number))
        train(name)

    started_at = time.monotonic()
    code = in_child(lambda: as_script(body))
    assert time.monotonic() - started_at < SECONDS
    return code


def check_moments(train, tmp_path: Path, capfd, number: int, count: int) -> None:
    calls = Calls(train, tmp_path / "reference")
    reference = outcome(tmp_path / "reference")
    capfd.readouterr()
    for trial, moment in enumerate(calls.draw(random.Random(f"{SEED} {number}"), count)):
        phase, step = calls.phases[moment - 1], calls.steps[moment - 1]
        told = f"{signal.Signals(number).name} at call {moment}: {phase}, step {step}"
        code = stopped_at(train, f"run {trial}", [moment], number)
        err = capfd.readouterr().err
        assert "Traceback" not in err, (told, err)
        if phase in ("starting", "ending"):  # nothing begun, or all saved: Python's and the system's own way to end
            assert code == (130 if number == signal.SIGINT else -number), (told, err)
        elif step == STEPS and code == 0:  # too late to stop anything
            assert "finishing this step" in err, told
        else:
            assert code == 75, (told, code, err)
            saved = int(re.search(r"stopped after step (\d+)", err)[1])
            newest = checkpoint.newest_good(tmp_path / f"run {trial}")
            assert newest is not None and newest.step == saved in (step, step + 1), (told, err)  # told late, it does one more
            assert not list((tmp_path / f"run {trial}").rglob("*.tmp")), told
        finish(train, tmp_path / f"run {trial}", reference)


def test_told_to_stop_in_every_phase_a_run_saves_and_ends_as_if_it_had_not_been(train, tmp_path, capfd):
    check_moments(train, tmp_path, capfd, signal.SIGTERM, count=9)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_told_to_stop_at_twenty_moments_a_run_saves_and_ends_as_if_it_had_not_been(train, tmp_path, capfd, number):
    check_moments(train, tmp_path, capfd, number, count=20)


def test_told_to_stop_at_any_point_between_two_steps_a_run_leaves_only_with_that_step_saved(train, tmp_path, capfd):
    """After the first step, when nothing is due: it must not leave because of a signal that came too late to save for."""
    calls = Calls(train, tmp_path / "reference")
    known = enumerate(zip(calls.callers, calls.phases, calls.steps, strict=True), 1)
    moments = [number for number, call in known if call == (["Trainer._loop"], "between steps", 1)]
    assert len(moments) >= 5
    capfd.readouterr()
    for moment in moments:
        code, err = stopped_at(train, f"run {moment}", [moment], signal.SIGTERM), capfd.readouterr().err
        saved = int(re.search(r"stopped after step (\d+)", err)[1])
        newest = checkpoint.newest_good(tmp_path / f"run {moment}")
        assert code == 75 and newest is not None and newest.step == saved in (1, 2), (moment, saved, newest)


# ---- more than once -------------------------------------------------------------------------------------------------------


def test_further_signals_while_it_saves_change_nothing(train, tmp_path, monkeypatch, capfd):
    """Impatience: Ctrl-C in a step, and again and again while the checkpoint is on its way to the disk."""
    calls = Calls(train, tmp_path / "reference")
    write = checkpoint.write

    def slowly(*arguments):
        for _ in range(3):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
        return write(*arguments)

    moment = calls.steps.index(4) + 1
    capfd.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", slowly)
        assert stopped_at(train, "run", [moment, moment + 50, moment + 60], signal.SIGINT) == 75
    err = capfd.readouterr().err
    assert err.count("finishing this step") == 1 and "stopped after step 4 of 8, and saved" in err and "Traceback" not in err
    finish(train, tmp_path / "run", outcome(tmp_path / "reference"))


def test_one_more_ctrl_c_on_the_way_out_does_not_spoil_the_exit_code(train, tmp_path, capfd):
    """After the checkpoint is on the disk and the handlers are the old ones again."""

    def body():
        where = ("Trainer.optimizer_step", "FolderLock.__exit__")
        at_each_call(lambda number, frame: frame.f_code.co_qualname in where and os.kill(os.getpid(), signal.SIGINT))
        train("run")

    assert in_child(lambda: as_script(body)) == 75
    err = capfd.readouterr().err
    assert "stopped after step 1 of 8, and saved" in err and "Traceback" not in err


# ---- the terminal ---------------------------------------------------------------------------------------------------------


def in_steps(path: Path, count: int = 2) -> None:
    """Wait until a run has recorded some steps."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (path / "metrics.jsonl").is_file() and len(metrics(path)) >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{path}: no step within a minute")


def ended(child: int, seconds: float = SECONDS) -> int:
    """A child's exit code, or minus its signal. One that is still there after ``seconds`` is killed, and that fails the test."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"still running after {seconds} s")


@pytest.fixture
def train_slowly(train, monkeypatch):
    """``train`` with steps long enough to be met in the middle; what is computed is the same."""
    from etude.training import trainer

    step = trainer.Trainer.optimizer_step

    def slow(self, batch):
        time.sleep(0.1)
        return step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "optimizer_step", slow)
    return train


def test_a_run_whose_terminal_is_closed_saves_and_leaves(train_slowly, tmp_path):
    """What it goes on printing has nowhere to go, and must not end it before it has saved."""
    child, terminal = pty.fork()
    if child == 0:
        sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))
        as_script(lambda: train_slowly("run"))
    in_steps(tmp_path / "run")
    os.close(terminal)
    assert ended(child) == 75
    train_slowly("whole")
    finish(train_slowly, tmp_path / "run", outcome(tmp_path / "whole"))


def test_under_nohup_a_run_outlives_the_terminal(train, tmp_path):
    def body():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        at_each_call(lambda number, frame: number % 500 == 0 and os.kill(os.getpid(), signal.SIGHUP))
        as_script(lambda: train("run"))

    assert in_child(body) == 0


@pytest.mark.parametrize("read", [True, False], ids=["read later", "never read"])
def test_a_signal_is_noted_though_standard_error_is_blocked(read):
    """A full pipe. print() in a signal handler raises RuntimeError (reentrant call) when it interrupts another print."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(writer, 2)
            sys.stderr = open(2, "w", closefd=False)
            with StopSignals() as stop:
                if read:
                    print("x" * 1_000_000, file=sys.stderr, flush=True)  # blocks in the middle, as a pipe holds 64 KiB
                else:
                    os.set_blocking(2, False)
                    with suppress(BlockingIOError):
                        while True:
                            os.write(2, b"x" * 4096)
                    os.set_blocking(2, True)
                while not stop.received:
                    time.sleep(0.01)
            code = 0
        except RuntimeError as error:
            print(error)
        finally:
            os._exit(code)
    os.close(writer)
    end = time.monotonic() + 5
    while time.monotonic() < end and not select.select([reader], [], [], 0.01)[0]:
        pass
    time.sleep(0.2)  # and now it is full
    os.kill(child, signal.SIGTERM)
    time.sleep(0.1)
    if read:
        while os.read(reader, 65536):
            pass
    assert ended(child, 5) == 0
    os.close(reader)


# ---- the scripts themselves, and all processes of a group -------------------------------------------------------------------

STEPS_OF_SCRIPT = 600
OPTIONS = [
    "--hidden_size", 16, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--block_size", 32, "--batch_size", 4,
    "--micro_batch_size", 2, "--dropout", 0.1, "--max_steps", STEPS_OF_SCRIPT, "--threads", 1, "--device", "cpu", "--precision", "fp32",
    "--log_every", 1, "--eval_every", 23, "--save_every", 11, "--sample_every", 17, "--val_fraction", 0.1,
]  # fmt: skip


def started(home: Path, output: Path) -> subprocess.Popen:
    """train_pretrain.py in a process group of its own."""
    command = [sys.executable, ROOT / "train/train_pretrain.py", *OPTIONS, "--output", output]
    return subprocess.Popen(
        [str(word) for word in command], env=environment(home), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def answer(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
    """The exit code and all output of a process, after which nobody of its group is left."""
    try:
        out, err = process.communicate(timeout=seconds)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in err, (out, err)
    return process.returncode, out + err


@pytest.mark.slow
def test_a_script_told_to_stop_at_random_moments_ends_as_if_it_had_not_been(tokenizer_folder, tmp_path):
    """One signal or three, to the process or, as a terminal does, to all of its group."""
    source = random.Random(SEED)
    write_texts(tmp_path / "training_data/pretrain/pretrain_hq.jsonl")
    shutil.copytree(tokenizer_folder, tmp_path / "weight/tokenizer")
    kinds = [(number, send) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) for send in (os.kill, os.killpg)]
    source.shuffle(kinds)
    run, saved = tmp_path / "run", 0
    for number, send in kinds:
        process = started(tmp_path, run)
        before = len(metrics(run)) if (run / "metrics.jsonl").is_file() else 0
        in_steps(run, before + 2)
        time.sleep(source.uniform(0, 0.3))
        for _ in range(source.choice((1, 3))):
            send(process.pid, number)
            time.sleep(source.uniform(0, 0.002))
        code, told = answer(process, SECONDS)
        assert code == 75, (number, send, told)
        newest = checkpoint.newest_good(run).step
        assert newest == int(re.search(r"stopped after step (\d+)", told)[1]) > saved
        saved = newest
    assert saved < STEPS_OF_SCRIPT
    for output in (run, tmp_path / "whole"):
        assert answer(started(tmp_path, output), 120)[0] == 0
    assert_same(run, outcome(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_script_told_to_stop_while_it_starts_leaves_nothing_half_written(tokenizer_folder, tmp_path, number):
    write_texts(tmp_path / "training_data/pretrain/pretrain_hq.jsonl")
    shutil.copytree(tokenizer_folder, tmp_path / "weight/tokenizer")
    source = random.Random(SEED)
    for _ in range(4):
        process = started(tmp_path, tmp_path / "run")
        time.sleep(source.uniform(0.3, 2.5))
        os.killpg(process.pid, number)
        code, told = answer(process, SECONDS)
        assert code in ((130, 75) if number == signal.SIGINT else (-number, 75)), told


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.05, 0.15, 0.4])
def test_asked_twice_while_processes_tokenise_a_script_leaves_at_once(tokenizer_folder, tmp_path, gap):
    shutil.copytree(tokenizer_folder, tmp_path / "weight/tokenizer")
    with open(tmp_path / "long.jsonl", "w", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"text": f"{number} words that are many, and not one like another. " * 40}) + "\n"
            for number in range(40_000)
        )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train/train_pretrain.py"), "--data", str(tmp_path / "long.jsonl"), "--workers", "2"],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep(6)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(gap)
    try:
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 130 and err.endswith(f"error: {cli.INTERRUPTED}\n") and "Traceback" not in err, err
        assert "tokenised" not in out  # or it was too late
        end = time.monotonic() + SECONDS
        with pytest.raises(ProcessLookupError):  # multiprocessing's own helper leaves a moment later
            while time.monotonic() < end:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_script_asked_until_it_is_gone_leaves_with_75(tokenizer_folder, tmp_path):
    """Impatience reaches Python's own way out, too, which takes a moment after torch was imported."""
    write_texts(tmp_path / "training_data/pretrain/pretrain_hq.jsonl")
    shutil.copytree(tokenizer_folder, tmp_path / "weight/tokenizer")
    for number in (signal.SIGINT, signal.SIGTERM):
        run = tmp_path / number.name
        process = started(tmp_path, run)
        in_steps(run)
        end = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < end:
            process.send_signal(number)
            time.sleep(0.02)
        code, told = answer(process, 1)
        assert code == 75 and "and saved" in told, told
        assert checkpoint.newest_good(run) is not None
