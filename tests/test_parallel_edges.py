"""Edges of a run: processes, and the thread that saves, held up where one running ahead would hurt; and what shows only in the
second micro-batch, under fp16, or where several things are wrong at once. Each test was missed by taking a protection away
(tests/mutations.py) that no other test noticed.
"""

import os
import subprocess
import sys
import time

import pytest
import torch
from test_faults import LONG, OUT_OF_MEMORY, spiking
from test_parallel import TWO, in_processes
from test_trainer import asking_to_stop, assert_same, make, metrics, no_waiting, one_thread, outcome  # noqa: F401

from etude.corpus.output import output_to
from etude.errors import DataError, Interrupted, MismatchError, PeerLost, StorageError, VerificationError
from etude.losses import IGNORED, Loss, causal_lm_loss
from etude.training import checkpoint
from etude.training.health import Health

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")
SETTINGS = {**TWO, "micro_batch_size": 3, "collective_timeout": 5.0}
COMPARED = ("tensors", "model.safetensors", "metrics")


def slow_writes(seconds: float, monkeypatch=None):
    """From now on every checkpoint takes ``seconds`` longer to be written."""
    write = checkpoint.write

    def slow(*arguments):
        time.sleep(seconds)
        return write(*arguments)

    if monkeypatch is None:  # in a process of its own
        checkpoint.write = slow
    else:
        monkeypatch.setattr(checkpoint, "write", slow)


@needs_fork
def test_no_process_leaves_before_the_save_is_on_the_disk(make, tmp_path):  # noqa: F811
    """torchrun ends all when one has ended."""

    def body(rank):
        if rank == 0:
            slow_writes(1.0)
        try:
            make("run", loss=asking_to_stop(3, micro_batches=1), save_every=100, **SETTINGS).run()
        except Interrupted:
            assert [path.name for path in checkpoint.found_in(tmp_path / "run")] == ["step-00000004"]
            raise

    assert in_processes(2, body, seconds=20) == [Interrupted.exit_code] * 2


@needs_fork
def test_no_checkpoint_is_moved_unless_all_could_read_theirs(make, tmp_path):  # noqa: F811
    make("run", save_every=2, **SETTINGS).run()
    before = checkpoint.found_in(tmp_path / "run")

    def body(rank):
        load = checkpoint.load

        def failing(path):
            time.sleep(1.0)
            raise DataError(f"{path}: damaged, as this process sees it")

        if rank == 1:
            checkpoint.load = failing
        try:
            make("run", resume=str(before[-1]), **SETTINGS).run()
        finally:
            checkpoint.load = load

    assert in_processes(2, body, seconds=20) == [PeerLost.exit_code, DataError.exit_code]
    assert checkpoint.found_in(tmp_path / "run") == before and len(before) > 1
    assert not list((tmp_path / "run").glob("checkpoints-before-*"))


@needs_fork
def test_all_go_on_from_the_checkpoint_that_the_first_finds(make, tmp_path):  # noqa: F811
    """A network file system may show another process an older state of the folder."""
    settings = {**SETTINGS, "save_every": 2}
    make("whole", **settings).run()

    def stopped(rank):
        make("run", loss=asking_to_stop(3, micro_batches=1), **settings).run()

    assert in_processes(2, stopped) == [Interrupted.exit_code] * 2

    def body(rank):
        if rank == 1:
            checkpoint.newest_good = lambda run: None
        make("run", **settings).run()

    assert in_processes(2, body, seconds=20) == [0, 0]
    assert_same(tmp_path / "run", {name: outcome(tmp_path / "whole")[name] for name in COMPARED})


@needs_fork
def test_only_the_first_writes(make, tmp_path):  # noqa: F811
    """Two that write one folder at once leave what neither wrote."""

    def body(rank):
        if rank == 1:
            wrong = tmp_path / "written by the second"
            checkpoint.write = lambda *arguments: wrong.touch()
            checkpoint.clean = checkpoint.set_aside = checkpoint.prune = checkpoint.write
        make("run", resume="never", **SETTINGS).run()

    assert in_processes(2, body, seconds=20) == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_whose_last_save_failed_does_not_say_that_it_is_saved(make, monkeypatch):  # noqa: F811
    def full(*arguments):
        raise StorageError("the disk is full")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(StorageError, match="the disk is full"):
        make("run", loss=asking_to_stop(2), save_every=100).run()


def test_going_back_waits_for_the_checkpoint_under_way(make, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Else a run would go back further than it has to; and the one before may be the oldest that is kept."""
    run = spiking(make("run", rewind_on_spike=1, **LONG), 32)
    slow_writes(0.5, monkeypatch)
    run.run()
    assert "back to step 30 (1 of at most 1)" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["skip_spikes", "rewind_on_spike"])
def test_a_batch_without_a_supervised_token_is_a_spike_and_no_step_of_zero(make, tmp_path, option):  # noqa: F811
    """Where nothing is in quarantine, nothing was left out on purpose."""
    run = make("run", **{option: 1}, **LONG)
    at = run.batches.at
    empty = lambda batch: {**batch, "labels": batch["labels"].fill_(IGNORED)}  # noqa: E731
    run.batches.at = lambda step: empty(at(step)) if step == 20 and not run.spikes.quarantine else at(step)
    run.run()
    found = checkpoint.newest_good(tmp_path / "run").state["spikes"]
    assert found["skipped"] == ([20] if option == "skip_spikes" else [])
    assert [entry["step"] for entry in found["quarantine"]] == ([20] if option == "rewind_on_spike" else [])
    assert 21 not in [record["step"] for record in metrics(tmp_path / "run") if "loss" in record]


def test_half_a_gradient_is_dropped_when_memory_runs_out(make, tmp_path):  # noqa: F811
    """The first micro-batch's is there when the second does not fit; kept, it would count twice."""
    make("small", micro_batch_size=1, dropout=0.0).run()
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += model.training
        if calls == 2 and model.training:
            raise OUT_OF_MEMORY[0]
        return causal_lm_loss(model, batch)

    make("halved", micro_batch_size=2, auto_micro_batch=True, dropout=0.0, loss=loss).run()
    assert_same(tmp_path / "halved", {name: outcome(tmp_path / "small")[name] for name in ("tensors", "model.safetensors")})


def test_a_gradient_of_exactly_nothing_stops_the_run(make, tmp_path):  # noqa: F811
    """A backward pass that is cut off somewhere looks like a run that does not learn."""

    def loss(model, batch):
        result = causal_lm_loss(model, batch)
        return Loss(result.sum * 0 + result.sum.detach(), result.weight) if run.step == 3 and model.training else result

    run = make("run", loss=loss, save_every=2)
    with pytest.raises(VerificationError, match=r"step 4: loss .+, gradient norm 0;") as caught:
        run.run()
    assert caught.value.exit_code == 70 and checkpoint.newest_good(tmp_path / "run").step == 2


def test_under_fp16_a_gradient_may_overflow_but_a_loss_may_not(make):  # noqa: F811
    health = Health(make("run").batches, torch.device("cpu"), scaled=True)
    weight, infinite = torch.tensor(5.0), torch.tensor(float("inf"))
    health.watch(0, torch.tensor(9.0), infinite, weight)
    for loss_sum in (infinite, infinite * 0):
        with pytest.raises(VerificationError, match=r"step 2: loss (inf|nan)"):
            health.watch(1, loss_sum, infinite, weight)


def test_all_that_differs_is_told_at_once(make):  # noqa: F811
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(1)).run()
    with pytest.raises(MismatchError) as caught:
        make("run", seed=1, beta2=0.9).run()
    assert "beta2 0.95 → 0.9; seed 0 → 1. " in str(caught.value) and "--allow_mismatch beta2,seed" in str(caught.value)


def test_a_part_is_on_the_disk_when_it_is_told(make, tmp_path, monkeypatch):  # noqa: F811
    """On another machine nobody else could see to it."""
    run, events = make("run"), []
    write, sync = checkpoint.write_safetensors, checkpoint.sync
    monkeypatch.setattr(checkpoint, "write_safetensors", lambda t, path: (events.append(("write", path.name)), write(t, path)))
    monkeypatch.setattr(checkpoint, "sync", lambda path: (events.append(("sync", path.name)), sync(path)))
    taken = checkpoint.snapshot({"step": 1}, run.model, run.optimizers)
    digests = checkpoint._write_part(taken, tmp_path, rank=0)
    assert events == [(what, name) for name in digests for what in ("write", "sync")] and len(digests) == 2


def test_what_a_killed_tool_left_goes_with_the_next_run(tmp_path):
    output = tmp_path / "out.jsonl"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (output.name, f"{output.name}.rejected.jsonl"):
        (tmp_path / f".{name}.{dead.pid}.tmp").write_text("half a ro")
    (tmp_path / f".other.jsonl.{dead.pid}.tmp").write_text("somebody else's")
    with output_to(str(output)) as rows:
        rows.write_line(b"{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".other.jsonl.{dead.pid}.tmp", "out.jsonl"]
