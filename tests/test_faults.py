"""What happens to runs on shared and borrowed machines: two at once, too little memory or disk, data that cannot be read."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple

import pytest
import torch
from test_trainer import asking_to_stop, assert_same, in_child, make, metrics, no_waiting, one_thread, outcome  # noqa: F401

from etude.errors import DataError, Interrupted, MismatchError, StorageError, UsageError, VerificationError
from etude.lock import FolderLock
from etude.losses import IGNORED, Loss, causal_lm_loss
from etude.training import checkpoint, resume, trainer

# ---- two runs, one folder -----------------------------------------------------------------------------------------------


def hold_lock(folder) -> subprocess.Popen:
    """Another process that holds a folder's lock until it is killed."""
    code = f"from etude.lock import FolderLock\nwith FolderLock({str(folder)!r}):\n    print('held', flush=True)\n    input()"
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
    with FolderLock(tmp_path / "run"):  # and given back by a run that ended
        pass


def test_the_lock_is_given_back_when_a_run_fails_or_is_stopped(make, tmp_path):  # noqa: F811
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(2)).run()
    with FolderLock(tmp_path / "run"):
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


# ---- checkpoints that are written while training goes on --------------------------------------------------------------------


class Blocked:
    """checkpoint.write that waits for :attr:`gate` before it begins."""

    def __init__(self, monkeypatch):
        self.gate, self.begun, write = threading.Event(), threading.Event(), checkpoint.write

        def blocked(*arguments):
            self.begun.set()
            assert self.gate.wait(30)
            return write(*arguments)

        monkeypatch.setattr(checkpoint, "write", blocked)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_reach_it(make, tmp_path, monkeypatch):  # noqa: F811
    settings = {"save_every": 3, "max_steps": 6, "keep_checkpoints": 9}
    make("plain", **settings).run()
    blocked = Blocked(monkeypatch)
    run = make("run", **settings)
    step = run.optimizer_step

    def going_on(batch):
        if run.step == 5:  # two updates after the copy was taken
            assert blocked.begun.is_set() and not checkpoint.found_in(tmp_path / "run")
            blocked.gate.set()
        return step(batch)

    run.optimizer_step = going_on
    run.run()
    for number in (3, 6):
        old, new = (checkpoint.load(tmp_path / name / f"checkpoints/step-{number:08d}") for name in ("plain", "run"))
        for kind in ("model", "optimizer", "rng"):
            assert all(torch.equal(tensor, getattr(new, kind)[name]) for name, tensor in getattr(old, kind).items())
        times = {"seconds"}
        assert {k: v for k, v in old.state.items() if k not in times} == {k: v for k, v in new.state.items() if k not in times}


def test_killed_while_a_checkpoint_is_under_way_the_one_before_it_is_loaded(make, tmp_path, monkeypatch):  # noqa: F811
    settings = {"save_every": 2, "max_steps": 8}
    make("whole", **settings).run()

    def body():
        run = make("run", **settings)
        step, write = run.optimizer_step, checkpoint.write
        checkpoint.write = lambda *arguments: time.sleep(30) if run.step >= 4 else write(*arguments)
        run.optimizer_step = lambda batch: os.kill(os.getpid(), signal.SIGKILL) if run.step == 5 else step(batch)
        run.run()

    assert in_child(body) == -signal.SIGKILL
    assert checkpoint.newest_good(tmp_path / "run").step == 2
    make("run", **settings).run()
    assert_same(
        tmp_path / "run", {name: outcome(tmp_path / "whole")[name] for name in ("tensors", "model.safetensors", "metrics")}
    )


def test_an_error_of_the_disk_ends_the_run_at_the_next_save_and_keeps_the_checkpoint_before(make, tmp_path, monkeypatch):  # noqa: F811
    write = checkpoint.write

    def failing(run, taken, keep, processes):
        if taken.state["step"] == 4:
            raise StorageError("model.safetensors: cannot be written (No space left on device); free some space")
        return write(run, taken, keep, processes)

    monkeypatch.setattr(checkpoint, "write", failing)
    run = make("run", save_every=2, max_steps=20)
    with pytest.raises(StorageError, match="No space left"):
        run.run()
    assert run.step == 6 and checkpoint.newest_good(tmp_path / "run").step == 2


def test_a_stopped_run_leaves_only_when_its_checkpoint_is_on_the_disk(make, tmp_path, monkeypatch):  # noqa: F811
    blocked = Blocked(monkeypatch)
    threading.Timer(0.3, blocked.gate.set).start()
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(5), save_every=100).run()
    assert checkpoint.newest_good(tmp_path / "run").step == 5


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


# ---- spikes ---------------------------------------------------------------------------------------------------------------

LONG = {"max_steps": 40, "save_every": 10, "eval_every": 20}


def spiking(run, *steps: int, factor: float = 1e3):
    """``run`` with the loss of these steps (from 1) times ``factor``."""

    def loss(model, batch):
        result = causal_lm_loss(model, batch)
        return Loss(result.sum * factor, result.weight) if model.training and run.step + 1 in steps else result

    run.gradients.loss = loss
    return run


@pytest.mark.parametrize("factor", [1e3, float("nan"), float("inf")])
def test_a_spike_is_skipped_counted_and_told(make, tmp_path, capsys, factor):  # noqa: F811
    spiking(make("run", skip_spikes=2, **LONG), 25, 30, factor=factor).run()
    found = checkpoint.newest_good(tmp_path / "run")
    assert found.state["spikes"]["skipped"] == [24, 29] and not found.state["spikes"]["quarantine"]
    printed = capsys.readouterr().out
    assert "spike     step 25: " in printed and "its update is skipped (1 of at most 2): row " in printed
    assert all(torch.isfinite(tensor).all() for tensor in found.model.values())


def test_a_skipped_step_changes_nothing_at_all(make, tmp_path):  # noqa: F811
    """Not the weights, not the optimizer's averages: as if the step's number alone had gone by."""
    settings = {**LONG, "save_every": 1, "keep_checkpoints": 40, "eval_every": 0}
    spiking(make("run", skip_spikes=1, **settings), 19).run()
    before, after = (checkpoint.load(tmp_path / f"run/checkpoints/step-{step:08d}") for step in (18, 19))
    for kind in ("model", "optimizer"):
        old, new = getattr(before, kind), getattr(after, kind)
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_spikes_are_counted_across_resumes_and_end_the_run_above_the_cap(make, tmp_path):  # noqa: F811
    def stopped_at(step):
        run = spiking(make("run", skip_spikes=2, **LONG), 18, 23, 35)
        run.batches.samples.load = lambda numbers, load=run.batches.samples.load: (
            os.kill(os.getpid(), signal.SIGTERM) if run.step == step else None, load(numbers))[1]  # fmt: skip
        return run

    for step in (20, 30):
        with pytest.raises(Interrupted):
            stopped_at(step).run()
    assert checkpoint.newest_good(tmp_path / "run").state["spikes"]["skipped"] == [17, 22]
    with pytest.raises(VerificationError, match=r"step 35: .*2 spikes were skipped already \(--skip_spikes\)") as caught:
        stopped_at(99).run()
    assert caught.value.exit_code == 70


@pytest.mark.parametrize("factor", [1e3, float("nan")])
def test_going_back_from_spikes_equals_having_known_them_from_the_start(make, tmp_path, capsys, factor):  # noqa: F811
    spiking(make("rewound", rewind_on_spike=2, **LONG), 28, 33, factor=factor).run()
    quarantine = checkpoint.newest_good(tmp_path / "rewound").state["spikes"]["quarantine"]
    assert [entry["step"] for entry in quarantine] == [27, 32]
    printed = capsys.readouterr().out
    assert "back to step 20 (1 of at most 2), without its samples: row " in printed and "back to step 30 (2 of" in printed

    knowing = spiking(make("knowing", rewind_on_spike=2, **LONG), 28, 33, factor=factor)
    knowing.leave_out([dict(entry) for entry in quarantine])
    knowing.run()
    assert "back to step" not in capsys.readouterr().out
    assert_same(tmp_path / "knowing", outcome(tmp_path / "rewound"))
    steps = [record["step"] for record in metrics(tmp_path / "rewound") if "loss" in record]
    assert len(steps) == len(set(steps)) and not {28, 33} & set(steps)


def test_documents_in_quarantine_teach_nothing_from_then_on(make):  # noqa: F811
    run = make("run", rewind_on_spike=1, **LONG)
    number = run.batches.numbers(20)[0]
    again = next(step for step in range(21, 40) if number in run.batches.numbers(step))
    plain = [run.batches.at(step)["labels"] for step in (20, again)]
    run.leave_out([{"step": 20, "documents": [2 * number + 1]}])
    before, after = (run.batches.at(step)["labels"] for step in (20, again))
    row = run.batches.numbers(again).index(number)
    assert torch.equal(before, plain[0]) and (after[row] == IGNORED).all() and (plain[1][row] != IGNORED).any()
    others = [index for index in range(len(after)) if index != row]
    assert torch.equal(after[others], plain[1][others])


def test_killed_after_going_back_a_run_ends_the_same(make, tmp_path):  # noqa: F811
    settings = {"rewind_on_spike": 1, **LONG}
    spiking(make("whole", **settings), 28).run()

    def body(step):
        run = spiking(make("killed", **settings), 28)
        optimizer_step = run.optimizer_step

        def dying(batch):
            if run.step == step and (step < 24 or run.spikes.quarantine):
                os.kill(os.getpid(), signal.SIGKILL)
            return optimizer_step(batch)

        run.optimizer_step = dying
        run.run()

    for step in (23, 25, 33):
        assert in_child(lambda step=step: body(step)) == -signal.SIGKILL
    spiking(make("killed", **settings), 28).run()
    assert_same(tmp_path / "killed", outcome(tmp_path / "whole"))


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_beginning(make, tmp_path):  # noqa: F811
    settings = {"rewind_on_spike": 1, **LONG}
    spiking(make("rewound", **settings), 3, factor=float("nan")).run()
    knowing = make("knowing", **settings)
    knowing.leave_out(checkpoint.newest_good(tmp_path / "rewound").state["spikes"]["quarantine"])
    knowing.run()
    assert_same(tmp_path / "knowing", outcome(tmp_path / "rewound"))


def test_a_run_goes_back_at_most_so_often(make, tmp_path):  # noqa: F811
    with pytest.raises(VerificationError, match=r"step 33: .*the run went back 1 times already \(--rewind_on_spike\)"):
        spiking(make("run", rewind_on_spike=1, **LONG), 28, 33).run()
    assert checkpoint.newest_good(tmp_path / "run").step == 30


def test_without_spikes_the_options_change_nothing(make, tmp_path):  # noqa: F811
    make("plain").run()
    for name, option in (("skips", {"skip_spikes": 3}), ("rewinds", {"rewind_on_spike": 3})):
        make(name, **option).run()
        assert_same(tmp_path / name, {key: outcome(tmp_path / "plain")[key] for key in ("tensors", "model.safetensors")})


def test_both_answers_to_a_spike_at_once_are_refused(make):  # noqa: F811
    with pytest.raises(UsageError, match="two answers to one thing"):
        make("run", skip_spikes=1, rewind_on_spike=1)


def with_fp16_scaler(run):
    """``run`` as on a GPU of before bf16: with a gradient scaler, here the CPU's."""
    run.gradients.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run.health._scaled = True
    return run


@pytest.mark.parametrize("factor", [1e3, float("nan")])
@pytest.mark.parametrize("option", ["skip_spikes", "rewind_on_spike"])
def test_with_a_gradient_scaler_spikes_are_answered_too(make, tmp_path, option, factor):  # noqa: F811
    with_fp16_scaler(spiking(make("run", **{option: 1}, **LONG), 25, factor=factor)).run()
    found = checkpoint.newest_good(tmp_path / "run").state["spikes"]
    assert found["skipped" if option == "skip_spikes" else "quarantine"]


def test_from_a_checkpoint_of_elsewhere_a_run_goes_back_to_that_and_no_other(make, tmp_path, monkeypatch):  # noqa: F811
    settings = {"rewind_on_spike": 1, **LONG}
    for name, step, rate in (("a", 12, 0.02), ("b", 4, 0.001)):  # the second is an older, unrelated run's folder
        with pytest.raises(Interrupted):
            make(name, loss=asking_to_stop(step), learning_rate=rate, **settings).run()
    start = checkpoint.newest_good(tmp_path / "a").path
    run = spiking(make("b", resume=str(start), **settings), 19, factor=float("nan"))
    taken, take = [], resume.take
    told = lambda run, found: (taken.append((found.step, found.state["identity"]["learning_rate"])), take(run, found))  # noqa: E731
    monkeypatch.setattr(resume, "take", told)
    run.run()
    assert taken == [(12, 0.02), (12, 0.02)]


def test_a_validation_that_was_made_up_for_is_so_after_going_back_as_well(make, tmp_path, monkeypatch):  # noqa: F811
    settings = {"rewind_on_spike": 1, **LONG}
    spiking(make("whole", **settings), 28).run()
    evaluate = trainer.evaluate_loss
    run = make("run", **settings)
    stopping = lambda *a, **k: (run.step == 20 and os.kill(os.getpid(), signal.SIGTERM), evaluate(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(trainer, "evaluate_loss", stopping)
    with pytest.raises(Interrupted):
        run.run()
    monkeypatch.setattr(trainer, "evaluate_loss", evaluate)
    assert checkpoint.newest_good(tmp_path / "run").state["validation_pending"]
    again = spiking(make("run", **settings), 28)
    step = again.optimizer_step
    again.optimizer_step = lambda batch: (again.step == 32 and os.kill(os.getpid(), signal.SIGTERM), step(batch))[1]
    with pytest.raises(Interrupted):
        again.run()
    assert not checkpoint.newest_good(tmp_path / "run").state["validation_pending"]
    spiking(make("run", **settings), 28).run()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_out_of_memory_in_the_optimizer_is_told_as_such(make):  # noqa: F811
    run = make("run", auto_micro_batch=True)

    def first_step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    run.optimizers[0].step = first_step
    with pytest.raises(UsageError, match="step 1: out of memory in the optimizer"):
        run.run()


def test_an_error_of_a_save_is_told_even_when_something_else_ends_the_run(make, monkeypatch, capfd):  # noqa: F811
    write = checkpoint.write

    def failing(run, taken, keep, processes):
        if taken.state["step"] == 4:
            time.sleep(0.2)
            raise StorageError("model.safetensors: the disk is full")
        return write(run, taken, keep, processes)

    monkeypatch.setattr(checkpoint, "write", failing)
    with pytest.raises(VerificationError):
        spiking(make("run", save_every=4), 6, factor=float("nan")).run()
    assert "warning: the last checkpoint was not written: model.safetensors: the disk is full" in capfd.readouterr().err


def test_a_file_system_without_locks_is_warned_of_and_used(make, monkeypatch, capfd):  # noqa: F811
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    make("run").run()
    assert "cannot be locked (Function not implemented)" in capfd.readouterr().err


def test_a_lock_is_free_when_it_is_given_back_though_a_child_holds_its_file(tmp_path):
    with FolderLock(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    try:
        with FolderLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
