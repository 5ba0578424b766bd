"""A model divided over two processes is the model of one: the same training, the same state, and checkpoints that either reads."""

import json
import os
import signal
import time

import pytest
import torch
from test_linear import allow_fp8, cpu_multiplies_rows
from test_parallel import TWO, in_processes
from test_trainer import asking_to_stop, assert_same, make, metrics, no_waiting, one_thread, outcome  # noqa: F401

from etude.errors import DataError, Interrupted, StorageError, UsageError
from etude.losses import causal_lm_loss
from etude.training import checkpoint, muon, optim, sharding
from etude.weights import load_model, to_disk_name

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")
DIVIDED = {**TWO, "parallel": "fsdp", "micro_batch_size": 3}


def tensors(run) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a run's newest checkpoint."""
    found = checkpoint.newest_good(run)
    return found.model | found.optimizer


def assert_close(run, other, slack: float = 1) -> None:
    """Both were trained alike: only the order of sums differs (the norm's, by which gradients are clipped). Muon wants some slack,
    since it makes small directions of a gradient large, with what rounding left of them.
    """
    one, two = tensors(run), tensors(other)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            two[name], one[name], rtol=slack * 1e-4, atol=slack * 1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    losses = [[record["loss"] for record in metrics(folder) if "loss" in record] for folder in (run, other)]
    assert losses[0] == pytest.approx(losses[1], rel=slack * 1e-5) and len(losses[0]) > 1
    validated = [[record["val_loss"] for record in metrics(folder) if "val_loss" in record] for folder in (run, other)]
    assert validated[0] == pytest.approx(validated[1], rel=slack * 1e-5) and len(validated[0]) > 1


@pytest.fixture
def exact_muon(monkeypatch):
    """Muon in fp32, and even the small matrices of these models shared out: in bf16 an update that is wrong is hardly seen in a loss."""
    monkeypatch.setattr(optim, "pick_precision", lambda *_: "fp32")
    monkeypatch.setattr(muon, "SHARED_ELEMENTS", 0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_divided_a_model_is_trained_as_it_is_whole(make, tmp_path, exact_muon, kind, tied):  # noqa: F811
    settings = {**DIVIDED, "optimizer": kind, "tie_word_embeddings": tied, "micro_batch_size": 2, "batch_size": 8}
    settings["epsilon"] = 1e-6  # Adam's step where a gradient is nearly nothing is else decided by its last bits
    make("whole", **settings).run()  # one process: there is nothing to divide
    assert in_processes(2, lambda rank: make("divided", **settings).run()) == [0, 0]
    assert_close(tmp_path / "whole", tmp_path / "divided", slack=1 if kind == "adamw" else 50)
    path = checkpoint.found_in(tmp_path / "divided")[0]
    names = {f"{stem}-0000{part}-of-00002.safetensors" for stem in ("model", "optimizer") for part in (1, 2)}
    assert {file.name for file in path.iterdir()} == names | {"rng.safetensors", "state.json", "manifest.json"}
    # What the run leaves for others is one whole model.
    saved, trained = load_model(tmp_path / "divided").state_dict(), checkpoint.load(path).model
    assert all(torch.equal(saved[name], weight) for name, weight in trained.items())


@pytest.mark.skipif(not cpu_multiplies_rows(), reason="this torch has no such products on a CPU")
def test_in_8_bits_too(make, tmp_path, monkeypatch):  # noqa: F811
    """Weights are gathered before they are rounded, and each token's row has its own scale."""
    allow_fp8(monkeypatch)
    settings = {**DIVIDED, "micro_batch_size": 2, "batch_size": 8, "epsilon": 1e-6, "precision": "fp8", "max_steps": 3}
    make("whole", **settings).run()
    assert in_processes(2, lambda rank: make("divided", **settings).run()) == [0, 0]
    whole, divided = (
        [record["loss"] for record in metrics(tmp_path / name) if "loss" in record] for name in ("whole", "divided")
    )
    assert whole == pytest.approx(divided, rel=1e-4)
    settings["precision"] = "bf16"
    make("bf16", **settings).run()
    assert whole != pytest.approx([record["loss"] for record in metrics(tmp_path / "bf16") if "loss" in record], rel=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_divided_state_comes_back_whole_and_is_divided_again(make, tmp_path, kind, count):  # noqa: F811
    """Saved by two, loaded by ``count``: every tensor of model and optimizer, bit for bit; and back again."""
    settings = {**DIVIDED, "batch_size": 6, "optimizer": kind, "save_every": 2, "max_steps": 6}

    def body(rank):
        make("run", loss=asking_to_stop(4, micro_batches=1), **settings).run()

    assert in_processes(2, body) == [Interrupted.exit_code] * 2
    before = tensors(tmp_path / "run")
    moments = [name for name in before if "exp_avg" in name or "momentum" in name]
    assert moments and all(before[name].abs().sum() > 0 for name in moments)

    def look(rank):
        run = make("run", **settings)
        loop = run._loop

        def compare(loader, stop):
            again = checkpoint.snapshot({}, run.model, run.optimizers, run.parts)
            parts = again.model | again.optimizer
            for name, whole in before.items():
                part = parts[name if "/" in name else f"model.{name}" if not name.startswith("lm_head") else name]
                if whole.ndim and run.sharded:
                    whole = [*whole.chunk(count), *[whole[:0]] * count][rank]
                assert torch.equal(part, whole) and part.dtype == whole.dtype, name
            loop(loader, stop)

        run._loop = compare
        run.run()

    assert in_processes(count, look) == [0] * count
    assert in_processes(2, lambda rank: make("whole", **settings).run()) == [0, 0]
    if kind == "adamw":
        assert_close(tmp_path / "whole", tmp_path / "run")


def test_divided_runs_that_are_killed_and_stopped_end_as_if_they_had_not_been(make, tmp_path):  # noqa: F811
    settings = {**DIVIDED, "save_every": 2}
    assert in_processes(2, lambda rank: make("whole", **settings).run()) == [0, 0]

    def killed(rank):
        run = make("run", **settings)
        step = run.optimizer_step
        run.optimizer_step = lambda batch: os.kill(os.getpid(), signal.SIGKILL) if run.step == 5 else step(batch)
        run.run()

    assert set(in_processes(2, killed)) == {-signal.SIGKILL}

    def stopped(rank):
        make("run", loss=asking_to_stop(2, micro_batches=1) if rank else causal_lm_loss, **settings).run()

    assert in_processes(2, stopped) == [Interrupted.exit_code] * 2
    assert in_processes(2, lambda rank: make("run", **settings).run()) == [0, 0]
    assert_same(
        tmp_path / "run", {name: outcome(tmp_path / "whole")[name] for name in ("tensors", "model.safetensors", "metrics")}
    )


@pytest.mark.parametrize("lost", [0, 1])
def test_killed_while_writing_its_part_the_checkpoint_before_is_loaded(make, tmp_path, lost):  # noqa: F811
    settings = {**DIVIDED, "save_every": 2}

    def body(rank):
        write = checkpoint.write_safetensors

        def deadly(values, path):
            if rank == lost and "step-00000004" in str(path) and path.name.startswith("optimizer"):
                os.kill(os.getpid(), signal.SIGKILL)
            write(values, path)

        checkpoint.write_safetensors = deadly
        make("run", **settings).run()

    codes = in_processes(2, body, seconds=30)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 75
    assert [path.name for path in checkpoint.found_in(tmp_path / "run")] == ["step-00000002"]
    assert in_processes(2, lambda rank: make("run", **settings).run()) == [0, 0]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert in_processes(2, lambda rank: make("whole", **settings).run()) == [0, 0]
    assert_same(tmp_path / "run", {"tensors": outcome(tmp_path / "whole")["tensors"]})


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_disk_ends_all_with_the_checkpoint_before(make, tmp_path, capfd, who):  # noqa: F811
    def body(rank):
        write = checkpoint.write_safetensors

        def failing(values, path):
            if rank == who and "step-00000004" in str(path):
                raise StorageError(f"{path.name}: cannot be written (No space left on device); free some space")
            write(values, path)

        checkpoint.write_safetensors = failing
        make("run", **DIVIDED, save_every=2).run()

    assert in_processes(2, body, seconds=30) == [StorageError.exit_code] * 2
    assert capfd.readouterr().err.count("No space left on device") >= 2
    assert [path.name for path in checkpoint.found_in(tmp_path / "run")] == ["step-00000002"]


def test_no_part_is_told_written_before_it_is_on_the_disk(make, tmp_path, monkeypatch):  # noqa: F811
    """A slow process's part is waited for, and the checkpoint has its name only with all parts."""
    monkeypatch.setattr(time, "sleep", time.sleep)

    def body(rank):
        write = checkpoint.write_safetensors

        def slow(values, path):
            if rank == 1:
                time.sleep(0.3)
                assert not checkpoint.found_in(tmp_path / "run") or path.parent.name.startswith(".step-")
            write(values, path)

        checkpoint.write_safetensors = slow
        make("run", **DIVIDED, save_every=3).run()

    assert in_processes(2, body) == [0, 0]
    for path in checkpoint.found_in(tmp_path / "run"):
        checkpoint.verify(path)


def test_a_missing_swapped_or_foreign_part_is_named(make, tmp_path):  # noqa: F811
    assert in_processes(2, lambda rank: make("run", **DIVIDED).run()) == [0, 0]
    path = checkpoint.found_in(tmp_path / "run")[0]
    one, two = (path / name for name in checkpoint.part_names("model", 2))
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1]), two.write_bytes(contents[0])
    with pytest.raises(DataError, match=r"model-00001-of-00002\.safetensors: damaged"):
        checkpoint.load(path)
    one.write_bytes(contents[0]), two.unlink()
    with pytest.raises(DataError, match=r"model-00002-of-00002\.safetensors: missing"):
        checkpoint.load(path)
    two.write_bytes(contents[1])
    manifest = json.loads((path / "manifest.json").read_text())
    for name in [name for name in manifest if "00002-of" in name]:
        (path / "manifest.json").write_text(json.dumps({key: value for key, value in manifest.items() if key != name}))
        with pytest.raises(DataError, match=r"manifest\.json: damaged"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch_size": 5}, r"batch_size \(5\) must be a multiple of the number of processes \(2\) with --parallel fsdp"),
        ({"auto_micro_batch": True}, "--auto_micro_batch goes with --parallel ddp only"),
    ],
)
def test_what_does_not_go_with_a_divided_model_is_refused(make, monkeypatch, settings, told):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=told):
        make("run", **{**DIVIDED, **settings})


def test_samples_are_printed_and_training_goes_on_with_the_weights_it_has(make, tmp_path):  # noqa: F811
    """Printing a sample gathers the weights; were they kept, the next step would compute with old ones."""
    from etude.generation.plain import generate
    from etude.generation.settings import SamplingSettings

    def body(rank, name, every):
        run = make(name, **DIVIDED, sample_every=every)
        settings = SamplingSettings(max_new_tokens=4, temperature=0)
        run.sample = lambda model: str([step.tokens for step in generate(model.eval(), [[9, 10]], settings, set(), 0)])
        sample = run.sample
        run.sample = lambda model: (sample(model), model.train())[0]
        run.run()

    for name, every in (("plain", 0), ("sampled", 1)):
        assert in_processes(2, lambda rank, name=name, every=every: body(rank, name, every)) == [0, 0]
    assert_same(tmp_path / "sampled", {"tensors": outcome(tmp_path / "plain")["tensors"]})


def test_parts_of_two_steps_are_not_taken_for_one(make, tmp_path):  # noqa: F811
    """Even where somebody has made the manifest anew."""
    assert in_processes(2, lambda rank: make("run", **DIVIDED, save_every=4).run()) == [0, 0]
    newest, older = checkpoint.found_in(tmp_path / "run")
    name = checkpoint.part_names("optimizer", 2)[1]
    (newest / name).write_bytes((older / name).read_bytes())
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {name: checkpoint.sha256(newest / name)}))
    with pytest.raises(DataError, match=rf"{name}: not of the same step as optimizer-00001-of-00002\.safetensors"):
        checkpoint.load(newest)


def test_a_manifest_of_no_parts_at_all_is_damaged(make, tmp_path, capsys):  # noqa: F811
    make("run", save_every=4).run()
    newest, older = checkpoint.found_in(tmp_path / "run")
    manifest = json.loads((newest / "manifest.json").read_text())
    names = {
        "model.safetensors": "model-00000-of-00000.safetensors",
        "optimizer.safetensors": "optimizer-00000-of-00000.safetensors",
    }
    (newest / "manifest.json").write_text(json.dumps({names.get(name, name): digest for name, digest in manifest.items()}))
    assert checkpoint.newest_good(tmp_path / "run").path == older


@pytest.mark.parametrize("who", [0, 1])
def test_the_process_that_fails_in_writing_keeps_its_own_error(make, tmp_path, capfd, who):  # noqa: F811
    def body(rank):
        write = checkpoint.write_safetensors

        def failing(values, path):
            if rank == who and "step-00000004" in str(path):
                raise DataError("not to be written")
            write(values, path)

        checkpoint.write_safetensors = failing
        make("run", **DIVIDED, save_every=4, max_steps=4).run()  # no collective follows that would tell the others

    codes = in_processes(2, body, seconds=30)
    # Here the first process keeps the store, and takes it along; under torchrun it stays.
    assert codes[who] == DataError.exit_code and codes[1 - who] in (StorageError.exit_code, 75)
    assert f"rank {who}: not to be written" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_process_may_have_no_row_of_a_matrix(make, tmp_path, exact_muon, kind):  # noqa: F811
    shape = {
        "hidden_size": 4,
        "num_attention_heads": 2,
        "intermediate_size": 2,
    }  # over three processes: 2, 0, 0 and 2, 2, 0 rows
    settings = {**DIVIDED, **shape, "batch_size": 6, "micro_batch_size": 2, "optimizer": kind, "epsilon": 1e-6}
    make("whole", **settings).run()
    assert in_processes(3, lambda rank: make("divided", **settings).run()) == [0] * 3
    assert_close(tmp_path / "whole", tmp_path / "divided", slack=1 if kind == "adamw" else 50)


@pytest.mark.parametrize("gathered", [1, 2**27])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_layers_gathered_one_by_one_or_together_are_trained_alike(make, tmp_path, monkeypatch, exact_muon, kind, gathered):  # noqa: F811
    settings = {**DIVIDED, "optimizer": kind, "num_hidden_layers": 3, "epsilon": 1e-6}
    make("whole", **settings).run()
    monkeypatch.setattr(sharding, "GATHERED", gathered)
    assert in_processes(2, lambda rank: make("divided", **settings).run()) == [0, 0]
    assert_close(tmp_path / "whole", tmp_path / "divided", slack=1 if kind == "adamw" else 50)


def test_groups_hold_as_many_layers_as_are_to_be_gathered_together_and_not_all(monkeypatch):
    layers = torch.nn.ModuleList(torch.nn.Linear(10, 10, bias=False) for _ in range(7))
    sizes = {}
    for limit in (1, 100, 299, 300, 10**6):
        monkeypatch.setattr(sharding, "GATHERED", limit)
        groups = sharding._groups(layers)
        assert not groups or [layer for group in groups for layer in group] == list(layers)
        sizes[limit] = [len(group) for group in groups]
    assert sizes == {1: [1] * 7, 100: [1] * 7, 299: [2, 2, 2, 1], 300: [3, 3, 1], 10**6: []}


@pytest.mark.slow
@pytest.mark.parametrize("gathered", [1, 2**27])
def test_compiled_in_one_piece_or_by_layers_it_is_trained_alike(make, tmp_path, monkeypatch, gathered):  # noqa: F811
    settings = {**DIVIDED, "epsilon": 1e-6, "precision": "fp32", "max_steps": 4, "eval_every": 2}
    make("whole", **settings).run()
    monkeypatch.setattr(sharding, "GATHERED", gathered)
    compiled = []  # what each process was to compile
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append(function) or compile(function, **how))

    def body(rank: int) -> None:
        # Compiling threads that an earlier test has started are not there in a forked process, which would wait for them.
        with torch._inductor.config.patch(compile_threads=1):
            make("divided", **settings, compile="on").run()
        names = {function.__name__ for function in compiled}
        assert names == {"linear_cross_entropy"} | ({"hidden"} if gathered > 1 else {"forward", "embedded"})

    assert in_processes(2, body, seconds=300) == [0, 0]
    for name in ("loss", "val_loss"):
        found = [[record[name] for record in metrics(tmp_path / run) if name in record] for run in ("whole", "divided")]
        assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_two_machines_with_a_divided_copy_each_train_as_one_process(make, tmp_path, exact_muon, kind):  # noqa: F811
    settings = {**DIVIDED, "parallel": "hsdp", "optimizer": kind, "micro_batch_size": 2, "batch_size": 8, "epsilon": 1e-6}
    make("whole", **settings).run()
    assert in_processes(4, lambda rank: make("divided", **settings).run(), on_machine=2) == [0] * 4
    assert_close(tmp_path / "whole", tmp_path / "divided", slack=1 if kind == "adamw" else 50)
    names = {file.name for file in checkpoint.found_in(tmp_path / "divided")[0].iterdir()}
    assert {name for name in names if name.startswith("model")} == set(checkpoint.part_names("model", 2))  # the first machine's


@pytest.mark.parametrize(("count", "on_machine"), [(2, 2), (2, 1), (1, 1), (4, 2)])
def test_a_run_of_two_machines_goes_on_in_another_way(make, tmp_path, count, on_machine):  # noqa: F811
    settings = {**DIVIDED, "parallel": "hsdp", "micro_batch_size": 2, "batch_size": 8, "save_every": 2, "max_steps": 6}

    def stopped(rank):
        make("run", loss=asking_to_stop(4, micro_batches=1), **settings).run()

    assert in_processes(4, stopped, on_machine=2) == [Interrupted.exit_code] * 4
    before = tensors(tmp_path / "run")
    run = make("run", **{**settings, "max_steps": 4})
    again = checkpoint.newest_good(tmp_path / "run")
    checkpoint.restore(again, run.model, run.optimizers)
    taken = checkpoint.snapshot({}, run.model, run.optimizers)
    assert all(
        torch.equal((taken.model | taken.optimizer)[name if "/" in name else to_disk_name(name)], before[name])
        for name in before
    )
    assert in_processes(count, lambda rank: make("run", **settings).run(), on_machine=on_machine) == [0] * count
    assert in_processes(4, lambda rank: make("whole", **settings).run(), on_machine=2) == [0] * 4
    assert_close(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("here", [(2, 2, 4, 4), (1, 1, 2, 2), (1, 2, 2, 3)])
def test_machines_with_unlike_numbers_of_processes_are_refused_by_all(make, capfd, here):  # noqa: F811
    def body(rank):
        os.environ["LOCAL_WORLD_SIZE"] = str(here[rank])
        make("run", **{**DIVIDED, "parallel": "hsdp", "batch_size": 12}).run()

    assert in_processes(4, body, seconds=30) == [UsageError.exit_code] * 4
    told = f"wants as many processes on each machine, and there are {' and '.join(map(str, sorted(set(here))))}"
    assert told in capfd.readouterr().err


def test_machines_must_be_known(make, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="--parallel hsdp has to know how many processes a machine has"):
        make("run", **{**DIVIDED, "parallel": "hsdp"})


def test_machines_of_one_process_have_the_whole_model_each(make, tmp_path):  # noqa: F811
    settings = {**DIVIDED, "parallel": "hsdp", "batch_size": 5}  # which a divided model would refuse
    make("whole", **{**settings, "parallel": "ddp"}).run()
    assert in_processes(2, lambda rank: make("run", **settings).run(), on_machine=1) == [0, 0]
    assert_close(tmp_path / "whole", tmp_path / "run")
