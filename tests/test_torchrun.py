"""Two processes under torchrun, as a person starts them: told to stop, and started again by torchrun after one has died.

torchrun has an exit code of its own, so each process writes down its own, and its id.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROOT
from test_scripts import environment, write_texts
from test_signals import in_steps
from test_trainer import assert_same, outcome

from etude.training import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="sends signals that Windows does not have"),
]
STEPS = 400
OPTIONS = [
    "--hidden_size", 16, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--block_size", 32, "--batch_size", 4,
    "--micro_batch_size", 2, "--dropout", 0.1, "--max_steps", STEPS, "--threads", 1, "--device", "cpu", "--precision", "fp32",
    "--log_every", 1, "--eval_every", 90, "--save_every", 40, "--sample_every", 0, "--val_fraction", 0.1,
]  # fmt: skip
WORKER = f"""
import os, runpy, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
folder = os.environ["FOLDER"]

def note(kind, value):
    with open(f"{{folder}}/{{kind}}-{{rank}}-{{attempt}}", "w") as file:
        file.write(str(value))

note("pid", os.getpid())
if attempt == 0 and "DIES" in os.environ:
    from etude.training import checkpoint, trainer
    step, write = trainer.Trainer.optimizer_step, checkpoint.write

    def deadly(self, batch):
        if rank == int(os.environ["DIES"]) and self.step == 90:
            os._exit(1)
        return step(self, batch)

    def slowly(run, taken, *others):
        if taken.state["step"] == 80:
            note("saving", os.getpid())
            time.sleep(3)  # still at it, and holding the folder's lock, when the other one dies
        return write(run, taken, *others)

    trainer.Trainer.optimizer_step, checkpoint.write = deadly, slowly
if attempt == 1 and rank == 0:
    time.sleep(3)  # so the other one comes first, and must not take a dead process's address for this one's
sys.argv = sys.argv[1:]
try:
    runpy.run_path({str(ROOT / "train/train_pretrain.py")!r}, run_name="__main__")
except SystemExit as end:
    note("code", end.code or 0)
    raise
"""


@pytest.fixture(scope="module")
def home(tokenizer_folder, tmp_path_factory) -> Path:
    """A workspace, with the undisturbed run of one process in ``whole``."""
    home = tmp_path_factory.mktemp("home")
    write_texts(home / "training_data/pretrain/pretrain_hq.jsonl")
    shutil.copytree(tokenizer_folder, home / "weight/tokenizer")
    (home / "worker.py").write_text(WORKER)
    alone(home, home / "whole")
    return home


def alone(home: Path, output: Path) -> None:
    command = [sys.executable, ROOT / "train/train_pretrain.py", *OPTIONS, "--output", output]
    done = subprocess.run(list(map(str, command)), env=environment(home), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@contextmanager
def torchrun(home: Path, output: Path, *options: object, **variables: str):
    """torchrun with two processes of train_pretrain.py, and the folder for what they note. In the end all have to be gone."""
    notes = output.with_name(f"{output.name} notes")
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *options]
    process = subprocess.Popen(
        list(map(str, [*command, home / "worker.py", "train_pretrain.py", *OPTIONS, "--output", output])),
        env={**environment(home), "FOLDER": str(notes), **variables}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process, notes
        pids = [int(file.read_text()) for file in notes.glob("pid-*")]
        assert len(pids) >= 2 and not any(map(alive, pids))
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        for pid in [process.pid, *(int(file.read_text()) for file in notes.glob("pid-*"))]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def codes(notes: Path, attempt: int = 0) -> list[str]:
    """The exit codes that the processes of one attempt noted, by rank."""
    return [file.read_text() for file in sorted(notes.glob(f"code-*-{attempt}"))]


def test_torchrun_told_to_stop_lets_all_save_one_step_and_the_run_goes_on_in_any_number(home, tmp_path):
    run = tmp_path / "run"
    with torchrun(home, run) as (process, notes):
        in_steps(run, 50)
        told_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=30)
        assert time.monotonic() - told_at < 30
        assert codes(notes) == ["75", "75"], told
    stopped = re.findall(rf"error: stopped after step (\d+) of {STEPS}, and saved", told)
    assert len(stopped) == 1, told  # the first one tells
    step = int(stopped[0])
    assert 50 <= step < STEPS
    assert checkpoint.found_in(run)[0].name == f"step-{step:08d}"
    assert not list(run.rglob("*.tmp"))

    reference = outcome(home / "whole")
    shutil.copytree(run, tmp_path / "in one")
    alone(home, tmp_path / "in one")
    assert_same(tmp_path / "in one", reference)
    with torchrun(home, run) as (process, notes):
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and codes(notes) == ["0", "0"] and f"step-{step:08d}" in told, told
    assert_same(run, reference)


@pytest.mark.parametrize("lost", [0, 1])
def test_after_one_process_dies_torchrun_starts_all_again_and_the_run_ends_as_if_none_had(home, tmp_path, lost):
    """The first is still saving, with the folder locked, when the second dies; the new ones must not come too early."""
    run = tmp_path / "run"
    with torchrun(home, run, "--max_restarts", 1, DIES=str(lost)) as (process, notes):
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and codes(notes, attempt=1) == ["0", "0"], told
        assert (notes / "saving-0-0").exists()
    assert re.search(r"resume    from .*step-000000(40|80)", told), told
    assert "another run is training" not in told
    assert_same(run, outcome(home / "whole"))


def test_torchrun_told_to_stop_while_its_processes_start_leaves_none_behind(home, tmp_path):
    with torchrun(home, tmp_path / "run") as (process, notes):
        end = time.monotonic() + 60
        while len(list(notes.glob("pid-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert not list(tmp_path.rglob("*.tmp"))
