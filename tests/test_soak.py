"""A short soak: the whole of ``tests/soak.py``, with few kills; and that it sees what it is there to see."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import soak
from conftest import ROOT
from test_trainer import make, no_waiting, one_thread  # noqa: F401

from etude.training import tokenizer as tokenizer_stage
from etude.training.config import TokenizerConfig
from etude.weights import save_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")


@pytest.mark.slow
def test_a_pipeline_killed_in_every_stage_ends_as_if_it_had_not_been(tmp_path):
    command = [sys.executable, ROOT / "tests/soak.py", "--kills", "6", "--seed", "3", "--workspace", tmp_path / "work"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert re.search(r"^passed: 6 kills", done.stdout, re.MULTILINE), done.stdout
    for stage in ("tokenizer", "pretrain", "sft"):
        assert re.search(rf"^{stage} .* killed|^kill +\d+/6  {stage} ", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("kills", [1, 3, 6, 10, 100])
def test_every_stage_gets_its_share_of_the_kills(kills):
    shares = soak.shares(kills)
    assert sum(shares.values()) == max(3, kills) and min(shares.values()) >= 1
    assert kills < 100 or min(shares.values()) >= 10


def a_run(folder, losses) -> soak.Stage:
    stage = soak.Stage("pretrain", "", (), "run", steps=3)
    (folder / "run").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss, "seconds": step * len(str(folder))}) for step, loss in losses]
    (folder / "run/metrics.jsonl").write_text("\n".join(lines) + "\n")
    return stage


@pytest.mark.parametrize(
    "losses", [[(1, 3.0), (2, 2.0), (2, 2.0), (3, 1.0)], [(1, 3.0), (3, 1.0)], [(1, 3.0), (2, 2.0000001), (3, 1.0)]]
)
def test_a_step_twice_or_missing_or_with_another_loss_is_a_failure(tmp_path, monkeypatch, losses):
    good = [(1, 3.0), (2, 2.0), (3, 1.0)]
    stage = a_run(tmp_path / "whole", good)
    for name in ("same", "other"):
        a_run(tmp_path / name, good if name == "same" else losses)
    monkeypatch.setattr(soak, "same_file", lambda old, new: None)
    monkeypatch.setattr(soak, "same_checkpoints", lambda old, new: None)
    soak.compare(stage, tmp_path / "whole", tmp_path / "same")
    with pytest.raises(soak.Failed, match=r"metrics\.jsonl"):
        soak.compare(stage, tmp_path / "whole", tmp_path / "other")


@pytest.mark.parametrize("name", [".model.safetensors.77.tmp", "metrics.tmp", "loss.tmp.png", ".step-00000007.abc.old.tmp"])
def test_a_stray_file_is_a_failure_and_a_lock_is_none(tmp_path, name):
    (tmp_path / ".locks/abc").mkdir(parents=True)
    (tmp_path / ".locks/abc/.lock").touch()
    soak.require_no_strays(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(soak.Failed, match="left behind"):
        soak.require_no_strays(tmp_path)


# ---- what a soak has found ------------------------------------------------------------------------------------------------


def a_dead_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_what_a_killed_tokenizer_stage_left_half_written_goes_with_the_next(text_file, tmp_path):
    output = tmp_path / "tokenizer"
    output.mkdir()
    dead, living = (output / f".tokenizer.json.{pid}.tmp" for pid in (a_dead_process(), os.getppid()))
    for stray in (dead, living):
        stray.write_text("{")
    tokenizer_stage.train(TokenizerConfig(data=(str(text_file),), output=str(output), vocab_size=300))
    assert sorted(path.name for path in output.iterdir()) == [living.name, "tokenizer.json", "tokenizer_config.json"]


def killed_while_it_writes(model, folder) -> None:
    """A process that the system kills in the middle of a file: it may write a thousand bytes of each, and no more."""
    import resource

    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            save_model(model, folder)
        finally:
            os._exit(0)  # not killed, or an error: never on into the other tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ


def test_what_a_run_killed_while_it_wrote_its_best_model_left_goes_with_the_next(make, tmp_path):  # noqa: F811
    trainer = make("run")
    trainer.run()
    best = tmp_path / "run/best"
    before = set(best.iterdir())
    killed_while_it_writes(trainer.model, best)
    assert set(best.iterdir()) > before
    make("run").run()
    assert set(best.iterdir()) == before
    soak.require_no_strays(tmp_path)
