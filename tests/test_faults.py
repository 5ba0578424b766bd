"""What happens to runs on shared and borrowed machines: two at once, too little memory or disk, data that cannot be read."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from test_trainer import asking_to_stop, assert_same, in_child, make, metrics, no_waiting, one_thread, outcome  # noqa: F401

from etude.errors import DataError, Interrupted, MismatchError, StorageError, UsageError
from etude.losses import causal_lm_loss
from etude.training import checkpoint
from etude.training.lock import RunLock

# ---- two runs, one folder -----------------------------------------------------------------------------------------------


def hold_lock(folder) -> subprocess.Popen:
    """Another process that holds a folder's lock until it is killed."""
    code = (
        f"from etude.training.lock import RunLock\nwith RunLock({str(folder)!r}):\n    print('held', flush=True)\n    input()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_in_a_folder_is_refused_naming_the_first(make, tmp_path):  # noqa: F811
    other = hold_lock(tmp_path / "run")
    try:
        with pytest.raises(MismatchError, match=rf"run: another run is training into it \(pid {other.pid} on .+ since \d"):
            make("run").run()
        assert sorted(os.listdir(tmp_path / "run")) == [".lock"]
    finally:
        other.kill()
        other.wait()


def test_the_lock_of_a_killed_process_is_free(make, tmp_path):  # noqa: F811
    other = hold_lock(tmp_path / "run")
    other.send_signal(signal.SIGKILL)
    other.wait()
    make("run").run()
    with RunLock(tmp_path / "run"):  # and given back by a run that ended
        pass


def test_the_lock_is_given_back_when_a_run_fails_or_is_stopped(make, tmp_path):  # noqa: F811
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(2)).run()
    with RunLock(tmp_path / "run"):
        pass


# ---- what kills leave behind --------------------------------------------------------------------------------------------


def test_what_a_killed_run_left_half_written_is_cleaned_and_nothing_else(make, tmp_path):  # noqa: F811
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(4)).run()
    run = tmp_path / "run"
    for name in ("checkpoints/.step-00000005.abc.tmp", ".best.x.tmp"):
        (run / name).mkdir()
        (run / name / "half").write_text("x")
    (run / ".model.safetensors.77.tmp").write_text("x")
    (run / "notes.tmp").write_text("a person's own")
    make("run").run()
    left = [path.name for path in run.rglob("*") if path.name.endswith(".tmp")]
    assert left == ["notes.tmp"]
    make("whole").run()
    assert_same(run, {name: outcome(tmp_path / "whole")[name] for name in ("tensors", "model.safetensors")})


# ---- disk and memory ----------------------------------------------------------------------------------------------------


def test_too_small_a_disk_is_told_before_the_first_step(make, tmp_path, monkeypatch):  # noqa: F811
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 10_000, 10_000))
    with pytest.raises(StorageError, match=r"will write about \d+ MiB, and 0 MiB are free; free some space"):
        make("run").run()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_the_preflight_asks_for_is_what_a_run_writes(make, tmp_path, monkeypatch):  # noqa: F811
    """Enough for the checkpoints kept and one more, and not many times as much."""
    asked = []
    disk_usage = shutil.disk_usage

    def tight(path):
        asked.append(path)
        return disk_usage(path)._replace(free=room)

    monkeypatch.setattr(shutil, "disk_usage", tight)
    make_run = lambda: make("run", hidden_size=128, num_attention_heads=4, save_every=2, eval_every=2)  # noqa: E731
    room = 10**12
    make_run().run()
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    shutil.rmtree(tmp_path / "run")
    room = written * 2
    make_run().run()
    shutil.rmtree(tmp_path / "run")
    room = written * 3 // 4
    with pytest.raises(StorageError):
        make_run().run()
    assert len(asked) == 3


def short_of_memory(limit: int, error: Exception):
    """causal_lm_loss on a device that holds only ``limit`` rows."""

    def loss(model, batch):
        if model.training and len(batch["ids"]) > limit:
            raise error
        return causal_lm_loss(model, batch)

    return loss


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    ),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_says_what_was_tried_and_what_to_set(make, tmp_path, error):  # noqa: F811
    with pytest.raises(Interrupted):
        make("run", micro_batch_size=4, loss=asking_to_stop(3, micro_batches=2)).run()
    told = (
        r"step 4: out of memory with --micro_batch_size 4 of block_size 12; set --micro_batch_size 2 .*Checkpoints are intact"
    )
    with pytest.raises(UsageError, match=told):
        make("run", micro_batch_size=4, loss=short_of_memory(2, error)).run()
    assert checkpoint.newest_good(tmp_path / "run").step == 3


def test_micro_batches_are_halved_until_they_fit_and_the_run_is_the_same(make, tmp_path, capsys):  # noqa: F811
    make("small", micro_batch_size=1, dropout=0.0).run()
    settings = {"micro_batch_size": 5, "auto_micro_batch": True, "dropout": 0.0}
    make("halved", loss=short_of_memory(1, OUT_OF_MEMORY[0]), **settings).run()
    printed = capsys.readouterr()
    told = printed.out + printed.err
    assert "step 1: out of memory with --micro_batch_size 5" in told and "going on with 2" in told and "going on with 1" in told
    assert_same(tmp_path / "halved", {name: outcome(tmp_path / "small")[name] for name in ("tensors", "model.safetensors")})


def test_one_row_that_does_not_fit_ends_the_run(make):  # noqa: F811
    with pytest.raises(UsageError, match="--micro_batch_size 1 of block_size 12; set a shorter --block_size"):
        make("run", micro_batch_size=2, auto_micro_batch=True, loss=short_of_memory(0, OUT_OF_MEMORY[0])).run()


def test_another_error_of_the_device_is_not_taken_for_a_lack_of_memory(make):  # noqa: F811
    with pytest.raises(RuntimeError, match="illegal instruction"):
        make("run", auto_micro_batch=True, loss=short_of_memory(0, RuntimeError("illegal instruction"))).run()


# ---- data that cannot be read ---------------------------------------------------------------------------------------------


def test_samples_that_cannot_be_read_are_named_and_the_run_goes_on_later(make, tmp_path):  # noqa: F811
    run = make("run", save_every=1)
    load = run.batches.samples.load
    bad = run.batches.numbers(4)

    def failing(numbers):
        if list(numbers) == bad:
            raise OSError(5, "Input/output error")
        return load(numbers)

    run.batches.samples.load = failing
    with pytest.raises(
        DataError, match=rf"step 5: its samples cannot be read \(OSError: .*Input/output error\): row {bad[0]}, row"
    ):
        run.run()
    assert checkpoint.newest_good(tmp_path / "run").step == 4
    make("run", save_every=1).run()
    make("whole", save_every=1).run()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_run_that_hangs_in_reading_can_still_be_killed_and_resumed(make, tmp_path):  # noqa: F811
    """A frozen network disk: SIGTERM alone would wait for the read."""

    def body():
        run = make("run", save_every=1)
        load, first = run.batches.samples.load, run.batches.numbers(3)
        run.batches.samples.load = lambda numbers: time.sleep(60) if list(numbers) == first else load(numbers)
        signal.alarm(5)
        run.run()

    assert in_child(body) == -signal.SIGALRM
    make("run", save_every=1).run()
