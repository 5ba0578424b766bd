"""Several processes train one model: the same samples, the same bits, one stop, one save; and a lost one is told."""

import os
import signal
import socket
import sys
import threading
import time
import traceback

import pytest
import torch
from test_faults import LONG, spiking
from test_trainer import asking_to_stop, assert_same, make, metrics, no_waiting, one_thread, outcome  # noqa: F401

from etude.errors import EtudeError, Interrupted
from etude.losses import causal_lm_loss
from etude.parallel import Processes
from etude.training import checkpoint, muon, optim, trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")
TWO = {"batch_size": 6, "dropout": 0.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(count: int, body, seconds: float = 60.0, on_machine: int | None = None) -> list[int]:
    """Run ``body(rank)`` in ``count`` forked processes, as torchrun would start them; their exit codes, or minus their signals.

    ``on_machine`` of them take each other to be on one machine (default: all). Who is still there ``seconds`` later is killed.
    """
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            here = on_machine or count
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % here),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(here),
            }
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 99
            try:
                if rank:
                    sys.stdout = open(os.devnull, "w")
                body(rank)
                code = 0
            except EtudeError as error:
                print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
                code = error.exit_code
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < count and time.monotonic() < end:
        for child in set(children) - codes.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - codes.keys():
        os.kill(child, signal.SIGKILL)
        codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [codes[child] for child in children]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [5, 6, 7, 64])
def test_the_rows_of_all_processes_are_the_batch(count, rows):
    parts = [list(range(rows))[Processes(rank, count).rows(rows)] for rank in range(count)]
    assert [row for part in parts for row in part] == list(range(rows)) and all(parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", ["adamw", "muon", "muon shared out"])
def test_two_processes_reach_the_bits_of_one_with_two_micro_batches(make, tmp_path, monkeypatch, kind):  # noqa: F811
    if kind == "muon shared out":  # as larger matrices are. In bf16 fewer of them at a time may be rounded otherwise.
        monkeypatch.setattr(muon, "SHARED_ELEMENTS", 0)
        monkeypatch.setattr(optim, "pick_precision", lambda *_: "fp32")
    settings = {**TWO, "optimizer": kind.split()[0], "micro_batch_size": 3}
    make("one", **settings).run()
    assert in_processes(2, lambda rank: make("two", **settings).run()) == [0, 0]
    assert_same(tmp_path / "two", outcome(tmp_path / "one"))


@pytest.mark.parametrize(("count", "matrices"), [(2, 5), (3, 5), (3, 2)])
def test_processes_share_muon_s_matrices_out(monkeypatch, count, matrices):
    stack = torch.randn(matrices, 64, 600, generator=torch.Generator().manual_seed(0)) / 200
    wanted, made = muon.orthogonalized(stack), []
    iterate = muon.orthogonalized
    monkeypatch.setattr(muon, "orthogonalized", lambda part: made.append(len(part)) or iterate(part))

    def body(rank):
        processes = Processes(rank, count)
        with processes.together(torch.device("cpu")):
            optimizer = muon.Muon([torch.nn.Parameter(stack[0])], 0.1, 0.0, 0.9, dtype=torch.float32, processes=processes)
            assert torch.equal(optimizer._shared_out(stack), wanted)
            assert made == {(2, 5): [[3], [2]], (3, 5): [[2], [2], [1]], (3, 2): [[1], [1], []]}[count, matrices][rank]
            assert torch.equal(optimizer._shared_out(stack[:1]), wanted[:1]) and made[-1] == 1  # a small one: each makes all

    assert in_processes(count, body) == [0] * count


def test_dropout_drops_the_same_in_two_processes(make, tmp_path):  # noqa: F811
    settings = {**TWO, "dropout": 0.2, "micro_batch_size": 3}
    make("one", **settings).run()
    assert in_processes(2, lambda rank: make("two", **settings).run()) == [0, 0]
    assert_same(tmp_path / "two", outcome(tmp_path / "one"))


def test_three_processes_and_uneven_rows_train_as_one_does(make, tmp_path):  # noqa: F811
    settings = {"batch_size": 5, "dropout": 0.0, "micro_batch_size": 2}
    make("one", **settings).run()
    assert in_processes(3, lambda rank: make("three", **settings).run()) == [0, 0, 0]
    one, three = (checkpoint.newest_good(tmp_path / name).model for name in ("one", "three"))
    for name, weight in one.items():
        torch.testing.assert_close(three[name], weight, rtol=1e-5, atol=1e-6)
    losses = [[record["loss"] for record in metrics(tmp_path / name) if "loss" in record] for name in ("one", "three")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(make, tmp_path, first):  # noqa: F811
    """Killed in two processes it is resumed in one, or the other way round; same samples, same bits."""
    settings = {**TWO, "micro_batch_size": 3, "save_every": 2}
    make("whole", **settings).run()

    def killed(rank):
        run = make("run", **settings)
        step = run.optimizer_step
        run.optimizer_step = lambda batch: os.kill(os.getpid(), signal.SIGKILL) if run.step == 5 else step(batch)
        run.run()

    assert set(in_processes(first, killed)) == {-signal.SIGKILL}
    assert checkpoint.newest_good(tmp_path / "run").step in (2, 4)
    assert in_processes(3 - first, lambda rank: make("run", **settings).run()) == [0] * (3 - first)
    assert_same(
        tmp_path / "run", {name: outcome(tmp_path / "whole")[name] for name in ("tensors", "model.safetensors", "metrics")}
    )


def test_one_process_asked_to_stop_stops_all_after_one_step_with_one_save(make, tmp_path):  # noqa: F811
    settings = {**TWO, "micro_batch_size": 3, "save_every": 100}
    make("whole", **settings).run()

    def body(rank):
        loss = asking_to_stop(3, micro_batches=1) if rank == 1 else causal_lm_loss
        make("run", loss=loss, **settings).run()

    assert in_processes(2, body) == [Interrupted.exit_code] * 2
    assert [path.name for path in checkpoint.found_in(tmp_path / "run")] == ["step-00000004"]
    assert in_processes(2, lambda rank: make("run", **settings).run()) == [0, 0]
    assert_same(tmp_path / "run", {name: outcome(tmp_path / "whole")[name] for name in ("tensors", "model.safetensors")})


def test_a_bad_number_in_one_process_stops_all_before_it_reaches_the_weights(make, tmp_path, capfd):  # noqa: F811
    settings = {**TWO, "save_every": 2}

    def body(rank):
        run = make("run", **settings)

        def loss(model, batch):
            result = causal_lm_loss(model, batch)
            return type(result)(result.sum * float("nan"), result.weight) if rank == 1 and run.step == 4 else result

        run.gradients.loss = loss
        run.run()

    assert in_processes(2, body) == [70, 70]
    assert checkpoint.newest_good(tmp_path / "run").step == 4
    told = capfd.readouterr().err
    assert told.count("step 5: loss nan, gradient norm nan") == 2 and "samples: row " in told


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_hangs_is_named_and_the_others_leave(make, tmp_path, capfd, lost):  # noqa: F811
    settings = {**TWO, "collective_timeout": 1.0, "save_every": 2}

    def body(rank):
        run = make("run", **settings)
        step = run.optimizer_step
        run.optimizer_step = lambda batch: time.sleep(300) if rank == lost and run.step == 5 else step(batch)
        run.run()

    codes = in_processes(2, body, seconds=5)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 75
    told = capfd.readouterr().err
    assert f"rank {1 - lost} of 2, after step 5, adding up the gradients: no answer within 1 s" in told
    assert f"rank {lost} was last seen after step 5" in told


def test_a_process_that_dies_is_told_by_the_others_and_nothing_is_lost(make, tmp_path, capfd):  # noqa: F811
    settings = {**TWO, "save_every": 2, "micro_batch_size": 3}
    make("whole", **settings).run()

    def body(rank):
        run = make("run", **settings)
        step = run.optimizer_step
        run.optimizer_step = lambda batch: os._exit(1) if rank == 1 and run.step == 5 else step(batch)
        run.run()

    assert in_processes(2, body, seconds=30) == [75, 1]
    assert "rank 0 of 2, after step 5" in capfd.readouterr().err
    assert in_processes(2, lambda rank: make("run", **settings).run()) == [0, 0]
    assert_same(tmp_path / "run", {name: outcome(tmp_path / "whole")[name] for name in ("tensors", "model.safetensors")})


def test_two_processes_go_back_from_spikes_together(make, tmp_path):  # noqa: F811
    settings = {**TWO, "micro_batch_size": 3, "rewind_on_spike": 2, **LONG}
    spiking(make("one", **settings), 28, 33).run()
    assert in_processes(2, lambda rank: spiking(make("two", **settings), 28, 33).run()) == [0, 0]
    assert_same(tmp_path / "two", outcome(tmp_path / "one"))


def test_a_finished_run_and_a_named_checkpoint_do_in_two_processes_what_they_do_in_one(make, tmp_path):  # noqa: F811
    assert in_processes(2, lambda rank: make("run", **TWO).run()) == [0, 0]
    assert in_processes(2, lambda rank: make("run", **TWO).run()) == [0, 0]
    assert in_processes(2, lambda rank: make("run", resume="never", **TWO).run()) == [0, 0]
    first = checkpoint.found_in(tmp_path / "run")[-1]
    assert in_processes(2, lambda rank: make("run", resume=str(first), **TWO).run()) == [0, 0]


def test_told_to_stop_while_validating_two_processes_save_and_make_up_for_it(make, tmp_path):  # noqa: F811
    settings = {**TWO, "micro_batch_size": 3, "save_every": 100}
    make("whole", **settings).run()

    def body(rank):
        run, evaluate = make("run", **settings), trainer.evaluate_loss

        def interrupted(*arguments, **options):
            if run.step == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*arguments, **options)

        trainer.evaluate_loss = interrupted
        run.run()

    assert in_processes(2, body) == [75, 75]
    assert in_processes(2, lambda rank: make("run", **settings).run()) == [0, 0]
    assert_same(
        tmp_path / "run", {name: outcome(tmp_path / "whole")[name] for name in ("tensors", "model.safetensors", "metrics")}
    )


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("what", ["samples", "memory"])
def test_an_error_in_one_process_lets_the_other_leave(make, tmp_path, who, what):  # noqa: F811
    def body(rank):
        run = make("run", **TWO, save_every=2)
        if rank == who and what == "samples":
            load, bad = run.batches.samples.load, run.batches.numbers(4)[run.processes.rows(6)]

            def failing(numbers):
                if list(numbers) == bad:
                    raise OSError(5, "Input/output error")
                return load(numbers)

            run.batches.samples.load = failing
        elif rank == who:

            def loss(model, batch):
                if run.step == 4:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return causal_lm_loss(model, batch)

            run.gradients.loss = loss
        run.run()

    codes = in_processes(2, body, seconds=30)
    assert codes[who] == {"samples": 65, "memory": 2}[what] and codes[1 - who] == 75
    assert checkpoint.newest_good(tmp_path / "run").step in (2, 4)


def test_a_gpu_that_waits_for_a_lost_process_is_left_with_the_same_message(capfd):
    """Nothing can interrupt a wait for a GPU's queue; here a lock that is never let go stands for it."""

    def body(rank):
        processes = Processes(rank, 2, timeout_seconds=0.5)
        with processes.together(torch.device("cpu")):
            processes.any(False, 7)
            processes._on_gpu = True
            with processes.overseen("in step 8"):
                pass  # in time: nothing happens
            time.sleep(0.7)
            if rank == 0:
                with processes.overseen("in step 8"):
                    lock = threading.Lock()
                    lock.acquire()
                    lock.acquire()
            time.sleep(5)

    assert in_processes(2, body, seconds=3)[0] == 75
    assert "rank 0 of 2, after step 7, in step 8: no answer within 0.5 s" in capfd.readouterr().err


def test_running_out_of_memory_is_not_taken_for_a_lost_process():
    with pytest.raises(torch.OutOfMemoryError), Processes(0, 2)._telling("adding up the gradients"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_process_that_is_missing_at_the_start_is_told(make, capfd):  # noqa: F811
    def body(rank):
        if rank == 0:
            make("run", **TWO, collective_timeout=1.0).run()

    assert in_processes(2, body, seconds=20)[0] == 75
    assert "rank 0 of 2: the others did not start within 1 s" in capfd.readouterr().err
