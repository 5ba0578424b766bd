"""The loop: what a step computes, against a reference by hand; and that stopping it, in any way at any moment, changes nothing.

A run's outcome is compared bit for bit: weights, optimizer, best model and logged losses.
"""

import itertools
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etude.data.batches import Batches
from etude.device import pick_precision
from etude.errors import DataError, EtudeError, Interrupted, MismatchError, UsageError, VerificationError
from etude.losses import IGNORED, Loss, causal_lm_loss
from etude.runlog import RunLog, read_metrics
from etude.training import checkpoint, resume, trainer
from etude.training.config import PretrainConfig
from etude.training.optim import lr_at, make_optimizers, momentum_at
from etude.training.start import pretraining_model
from etude.training.trainer import Trainer
from etude.weights import load_model

STEPS = 8
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Drawing loss.png takes longer than all else here together; test_scripts has it drawn. SIGKILL loses nothing that was
    written, synced or not; test_files and test_checkpoint look at what is synced when.
    """
    monkeypatch.setattr(RunLog, "draw", lambda *arguments: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Rows:
    """Samples of random ids, a different share of each one's tokens supervised."""

    block_size = 12

    def __init__(self, count: int, vocab_size: int, seed: int):
        source = np.random.default_rng(seed)
        ids = source.integers(8, vocab_size, (count, self.block_size + 1))
        learnt = source.random((count, self.block_size)) < source.random((count, 1)) * 0.8 + 0.1
        self.ids, self.labels = ids[:, :-1], np.where(learnt, ids[:, 1:], IGNORED)

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, numbers) -> dict[str, np.ndarray]:
        return {"ids": self.ids[numbers], "labels": self.labels[numbers]}

    def documents(self, number: int) -> list[int]:
        return [2 * number, 2 * number + 1]

    def describe(self, number: int) -> str:
        return f"row {number}"


@pytest.fixture
def make(tokenizer, tmp_path):
    """``make("name", option=…)``: the trainer of a run of :data:`STEPS` steps in tmp_path/name, as train_pretrain makes it."""

    def make(name: str, loss=causal_lm_loss, model=None, fingerprints=None, rows_seed=0, double=False, **options) -> Trainer:
        settings = {
            "output": str(tmp_path / name), "tokenizer": "", "data": ("rows",), "block_size": Rows.block_size,
            "batch_size": 5, "micro_batch_size": 2, "max_steps": STEPS, "dropout": 0.1, "learning_rate": 0.02,
            "warmup_fraction": 0.3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 16, "initializer_range": 0.2, "device": "cpu", "precision": "fp32",
            "log_every": 1, "eval_every": 2, "save_every": 3, "sample_every": 0,
            "optimizer": "adamw", "schedule": "cosine", "final_lr_fraction": 0.1, "momentum_warmup": 0,
            "initializer": "normal", "tie_word_embeddings": True,
        }  # fmt: skip
        config = PretrainConfig(**{**settings, **options})
        model = pretraining_model(config, tokenizer) if model is None else model
        train, val = Rows(23, len(tokenizer), rows_seed), Rows(6, len(tokenizer), 100)
        return Trainer(
            config, model.double() if double else model, tokenizer,
            batches=Batches(train, config.batch_size, config.seed), loss=loss, val=val,
            fingerprints={"data": "abc", "tokenizer": "def", **(fingerprints or {})},
        )  # fmt: skip

    return make


TIMES = ("seconds", "tokens_per_second")


def metrics(output) -> list[dict]:
    records = read_metrics(Path(output) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def outcome(output) -> dict:
    """All that a run leaves, but for the times it took."""
    output = Path(output)
    newest = checkpoint.load(checkpoint.found_in(output)[0])
    tensors = {**newest.model, **newest.optimizer, **{f"rng.{name}": tensor for name, tensor in newest.rng.items()}}
    state = {key: value for key, value in newest.state.items() if key not in TIMES}
    return {
        "state": state,
        "tensors": {name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in tensors.items()},
        "metrics": metrics(output),
        **{name: (output / name).read_bytes() for name in ("model.safetensors", "config.json", "best/model.safetensors")},
    }


def assert_same(output, reference: dict) -> None:
    found = outcome(output)
    for name, value in reference.items():
        assert found[name] == value, name


def asking_to_stop(at_step: int, numbers=(signal.SIGTERM,), training: bool = True, micro_batches: int = 3):
    """causal_lm_loss that sends this process signals in the middle of a step (from 1), or during its validation."""
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += model.training
        inside = calls == (at_step - 1) * micro_batches + 2 if training else calls == at_step * micro_batches
        if model.training == training and inside:
            for number in numbers:
                os.kill(os.getpid(), number)
        return causal_lm_loss(model, batch)

    return loss


def in_child(body) -> int:
    """Run ``body()`` in a forked child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except EtudeError as error:
            os._exit(error.exit_code)
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, no second pytest goes on from here
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- stopping and going on ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["adamw", "muon"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def reference(make, tmp_path, kind) -> dict:
    """The outcome of an uninterrupted run."""
    make("reference", optimizer=kind).run()
    return outcome(tmp_path / "reference")


@pytest.mark.parametrize("when", ["in a step", "while validating"])
def test_asked_to_stop_at_any_step_a_run_ends_as_if_it_had_not_been(make, tmp_path, reference, kind, when):
    for k in range(1, STEPS + 1):
        if when == "while validating" and k % 2:
            continue
        name = f"stopped at {k}"
        with pytest.raises(Interrupted, match=f"stopped after step {k} of 8, and saved"):
            loss = asking_to_stop(k, (signal.SIGTERM, signal.SIGINT)[k % 2 :][:1], training=when == "in a step")
            make(name, loss=loss, optimizer=kind).run()
        assert checkpoint.newest_good(tmp_path / name).step == k
        make(name, optimizer=kind).run()
        # The last step's checkpoint is not written again for the validation that came after it.
        assert_same(tmp_path / name, reference if k < STEPS else {**reference, "state": outcome(tmp_path / name)["state"]})


def test_asked_to_stop_at_every_step_in_turn(make, tmp_path, reference, kind):
    for _ in range(STEPS - 1):
        with pytest.raises(Interrupted) as caught:
            make("run", optimizer=kind, loss=asking_to_stop(1)).run()
    assert caught.value.exit_code == 75 and "step 7 of 8" in str(caught.value)
    make("run", optimizer=kind).run()
    assert_same(tmp_path / "run", reference)


def test_further_signals_do_not_disturb_the_save(make, tmp_path, reference, kind):
    write = checkpoint.write

    def disturbed(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        path = write(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return path

    run = make("run", optimizer=kind, loss=asking_to_stop(2, (signal.SIGINT, signal.SIGTERM, signal.SIGINT)))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def body():
        checkpoint.write = disturbed
        try:
            run.run()
        finally:
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    assert in_child(body) == 75
    assert [path.name for path in checkpoint.found_in(tmp_path / "run")] == ["step-00000002"]
    make("run", optimizer=kind).run()
    assert_same(tmp_path / "run", reference)


def kill_after_record(step: int) -> None:
    """From now on, SIGKILL this process once a step's training loss is in metrics.jsonl."""
    write = RunLog.metrics

    def deadly(self, at, **values):
        write(self, at, **values)
        if at == step and "loss" in values:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.metrics = deadly


def test_killed_after_any_step_a_run_ends_as_if_it_had_not_been(make, tmp_path, reference, kind):
    for k in range(1, STEPS + 1):
        run = make(f"killed at {k}", optimizer=kind)
        assert in_child(lambda k=k, run=run: (kill_after_record(k), run.run())) == -signal.SIGKILL
        found = checkpoint.newest_good(tmp_path / f"killed at {k}")
        written = (k - 1) // 3 * 3
        assert (found.step if found else 0) in (written, max(0, written - 3))  # the newest may not have been on the disk yet
        make(f"killed at {k}", optimizer=kind).run()
        assert_same(tmp_path / f"killed at {k}", reference)


DISK = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}


def kill_at_disk_call(number: int) -> None:
    count = 0

    def note(event: str, arguments) -> None:
        nonlocal count
        if event in DISK:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)


@pytest.mark.parametrize("number", [3, 20, 45, 77, pytest.param(None, marks=pytest.mark.slow)])
def test_killed_at_any_touch_of_the_disk_a_run_ends_as_if_it_had_not_been(make, tmp_path, number):
    make("reference").run()
    reference = outcome(tmp_path / "reference")
    for at in range(1, 10_000, 3) if number is None else [number]:
        run = make(f"{at}")
        code = in_child(lambda run=run, at=at: (kill_at_disk_call(at), run.run()))
        assert code in (0, -signal.SIGKILL)
        make(f"{at}").run()
        assert_same(tmp_path / f"{at}", reference)
        if code == 0:
            break


@pytest.mark.slow
def test_killed_at_random_moments_until_it_is_done(make, tmp_path, kind):
    options = {"optimizer": kind, "max_steps": 60, "save_every": 2}
    make("reference", **options).run()
    source, kills = random.Random(0), 0
    while True:
        run = make("run", **options)
        child = os.fork()
        if child == 0:
            run.run()
            os._exit(0)
        time.sleep(source.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
    assert kills > 3
    assert_same(tmp_path / "run", outcome(tmp_path / "reference"))


def test_a_resumed_run_has_no_step_twice_in_its_metrics(make, tmp_path):
    run = make("run")
    assert in_child(lambda: (kill_after_record(6), run.run())) == -signal.SIGKILL
    assert [record["step"] for record in metrics(tmp_path / "run")][-1] == 6  # newer than the checkpoint of step 3
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # and cut short
    make("run").run()
    losses = [record["step"] for record in metrics(tmp_path / "run") if "loss" in record]
    validations = [record["step"] for record in metrics(tmp_path / "run") if "val_loss" in record]
    assert losses == list(range(1, STEPS + 1)) and validations == [2, 4, 6, 8]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_changes_nothing(make, tmp_path, capsys):
    make("run").run()
    before = contents(tmp_path / "run")
    capsys.readouterr()
    run = make("run")
    run.optimizer_step = None  # not one step
    run.run()
    assert "complete" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_a_run_may_be_made_longer_and_says_so(make, tmp_path, capsys):
    make("run", max_steps=4).run()
    make("run", max_steps=8).run()
    said = capsys.readouterr().out
    assert "steps 4 → 8" in said and "not the old run any more" in said
    steps = [record["step"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert steps == list(range(1, 9)) and checkpoint.newest_good(tmp_path / "run").step == 8
    with pytest.raises(MismatchError, match=r"at step 8 already.*past the 6"):
        make("run", max_steps=6).run()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"learning_rate": 0.01}, "learning_rate 0.02 → 0.01"),
        ({"seed": 1}, "seed 0 → 1"),
        ({"batch_size": 4}, "batch_size 5 → 4"),
        ({"weight_decay": 0.0}, "weight_decay 0.1 → 0.0"),
        ({"schedule": "linear"}, "schedule cosine → linear"),
        ({"dropout": 0.2}, "model.dropout 0.1 → 0.2"),
        ({"fingerprints": {"data": "xyz"}}, "data abc → xyz"),
        ({"fingerprints": {"tokenizer": "xyz"}}, "tokenizer def → xyz"),
        ({"fingerprints": {"base": "new"}}, "base None → new"),
    ],
)
def test_a_changed_run_is_refused_with_old_and_new_unless_allowed(make, tmp_path, capsys, change, told):
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(2)).run()
    before = contents(tmp_path / "run")
    with pytest.raises(MismatchError) as caught:
        make("run", **change).run()
    name = told.split()[0]
    assert told in str(caught.value) and f"--allow_mismatch {name}" in str(caught.value) and caught.value.exit_code == 78
    assert contents(tmp_path / "run") == before
    with pytest.raises(MismatchError):
        make("run", **change, allow_mismatch="something,else").run()
    make("run", **change, allow_mismatch=f" other, {name}").run()
    assert f"allowed: {told}" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[-1]["step"] == STEPS


def test_every_difference_is_listed_and_each_must_be_allowed(make, tmp_path):
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(1)).run()
    with pytest.raises(MismatchError) as caught:
        make("run", seed=1, beta2=0.9, allow_mismatch="seed").run()
    assert "beta2 0.95 → 0.9" in str(caught.value) and "seed 0" not in str(caught.value)


def test_another_shape_is_refused_even_if_allowed(make, tmp_path):
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(1)).run()
    with pytest.raises(MismatchError, match=r"model\.intermediate_size 16 → 24"):
        make("run", intermediate_size=24).run()
    with pytest.raises(MismatchError, match=r"mlp.*\(16, 16\).*\(24, 16\)"):
        make("run", intermediate_size=24, allow_mismatch="model.intermediate_size").run()


def test_what_does_not_change_the_result_may_differ(make, tmp_path):
    make("reference", dropout=0.0).run()
    with pytest.raises(Interrupted):
        make("run", dropout=0.0, loss=asking_to_stop(4)).run()
    make("run", dropout=0.0, log_every=2, save_every=5, keep_checkpoints=1, data=("elsewhere",), micro_batch_size=5).run()
    found, expected = load_model(tmp_path / "run"), load_model(tmp_path / "reference")
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


# ---- which checkpoint ---------------------------------------------------------------------------------------------------


def test_resuming_sets_nothing_aside_and_never_starts_over(make, tmp_path):
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(3)).run()
    make("run").run()
    assert not list((tmp_path / "run").glob("checkpoints-before*"))
    for path in checkpoint.found_in(tmp_path / "run"):
        (path / "state.json").write_text("{}")
    with pytest.raises(MismatchError, match="no usable checkpoint"):
        make("run").run()


def test_never_starts_over_and_keeps_the_old_checkpoints_elsewhere(make, tmp_path, capsys):
    make("run").run()
    make("run", resume="never", seed=1).run()
    assert "checkpoints-before-1" in capsys.readouterr().out
    old, new = (tmp_path / "run" / name / "step-00000008" for name in ("checkpoints-before-1", "checkpoints"))
    assert checkpoint.load(old).state["identity"]["seed"] == 0 and checkpoint.load(new).state["identity"]["seed"] == 1
    assert [record["step"] for record in metrics(tmp_path / "run") if "loss" in record] == list(range(1, STEPS + 1))


def test_a_named_checkpoint_is_taken_exactly_or_not_at_all(make, tmp_path):
    make("reference", keep_checkpoints=3).run()
    reference = outcome(tmp_path / "reference")
    third = tmp_path / "reference" / "checkpoints" / "step-00000003"
    run = make("run", resume=str(third))
    resume.go_on(run)
    assert run.step == 3
    make("run", resume=str(third)).run()
    assert_same(tmp_path / "run", {name: reference[name] for name in ("tensors", "model.safetensors")})
    (third / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"step-00000003.optimizer\.safetensors: damaged"):
        make("run", resume=str(third)).run()  # though newer ones are good
    with pytest.raises(DataError, match="nowhere"):
        make("run", resume=str(tmp_path / "nowhere")).run()


def test_a_branch_from_an_earlier_checkpoint_is_not_mixed_with_the_later_ones(make, tmp_path):
    """The later ones are of another future: they must neither crowd out the new ones nor be taken for the newest."""
    make("run", keep_checkpoints=3).run()
    third = tmp_path / "run" / "checkpoints" / "step-00000003"
    branch = {"learning_rate": 0.01, "allow_mismatch": "learning_rate", "keep_checkpoints": 1}
    with pytest.raises(Interrupted):
        make("run", **branch, resume=str(third), loss=asking_to_stop(1)).run()
    found = checkpoint.newest_good(tmp_path / "run")
    assert found.step == 4 and found.state["identity"]["learning_rate"] == 0.01


def test_a_damaged_newest_checkpoint_does_not_crowd_out_the_good_ones(make, tmp_path, capsys):
    make("reference").run()
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(7)).run()
    assert [path.name for path in checkpoint.found_in(tmp_path / "run")] == ["step-00000007", "step-00000006"]
    (tmp_path / "run" / "checkpoints" / "step-00000007" / "model.safetensors").write_bytes(b"")
    (tmp_path / "run" / "checkpoints" / "step-00000006").rename(tmp_path / "run" / "checkpoints" / "step-00000005")
    with pytest.raises(Interrupted):  # the checkpoint of step 6 holds step 6, whatever its folder is called
        make("run", loss=asking_to_stop(1), keep_checkpoints=1, save_every=1).run()
    assert "damaged" in capsys.readouterr().err
    assert checkpoint.newest_good(tmp_path / "run").step == 7
    make("run").run()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "reference" / "model.safetensors").read_bytes()


# ---- what a step computes -----------------------------------------------------------------------------------------------


def by_hand(model, config, samples: Rows, batches: Batches, steps: int) -> list[tuple[float, float]]:
    """AdamW in fp64 on the whole batch at once, from the formula (https://arxiv.org/abs/1711.05101); returns each step's
    (loss, gradient norm).
    """
    weights = dict(model.named_parameters())
    mean, square = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    told = []
    for step in range(steps):
        rows = samples.load(batches.numbers(step))
        ids, labels = torch.from_numpy(rows["ids"]), torch.from_numpy(rows["labels"])
        probabilities = F.log_softmax(model(ids), dim=-1)
        learnt = labels != IGNORED
        loss = -probabilities[learnt].gather(1, labels[learnt][:, None]).sum() / learnt.sum()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in gradients.values()))
        told.append((loss.item(), norm))
        clip = min(1.0, config.max_grad_norm / norm) if config.max_grad_norm else 1.0
        lr = lr_at(step, steps, config)
        for name, weight in weights.items():
            gradient = gradients[name] * clip
            mean[name] = config.beta1 * mean[name] + (1 - config.beta1) * gradient
            square[name] = config.beta2 * square[name] + (1 - config.beta2) * gradient**2
            unbiased = mean[name] / (1 - config.beta1 ** (step + 1))
            deviation = (square[name] / (1 - config.beta2 ** (step + 1))).sqrt()
            decay = 0.0 if "norm" in name or "embed_tokens" in name else config.weight_decay
            with torch.no_grad():
                weight.sub_(lr * (unbiased / (deviation + config.epsilon) + decay * weight))
    return told


def double_loss(model, batch) -> Loss:
    labels = batch["labels"].flatten()
    logits = model.logits(model.hidden(batch["ids"]).flatten(0, 1))
    return Loss(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), (labels != IGNORED).sum())


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("tied", [True, False])
def test_steps_are_those_of_the_formula(make, tmp_path, max_grad_norm, tied):
    """Weighting over uneven micro-batches, clipping, bias correction, decay (where it is due and where not), no gradient left
    over, the logged loss and norm: all of them in one comparison, to fp64's and the weight factor's precision.
    """
    options = {"dropout": 0.0, "weight_decay": 0.5, "tie_word_embeddings": tied, "max_grad_norm": max_grad_norm, "max_steps": 4}
    run = make("run", loss=double_loss, double=True, **options)
    reference = make("other", double=True, **options)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    run.run()
    told = by_hand(reference.model, run.config, run.batches.samples, run.batches, 4)
    for name, parameter in reference.model.named_parameters():
        assert not torch.allclose(before[name], parameter, atol=1e-3), name
        torch.testing.assert_close(run.model.get_parameter(name), parameter, rtol=0, atol=2e-6, msg=name)
    logged = [(record["loss"], record["grad_norm"]) for record in metrics(tmp_path / "run") if "loss" in record]
    np.testing.assert_allclose(logged, told, rtol=1e-6)
    assert max_grad_norm != 0.5 or min(norm for _, norm in told) > 0.5  # it did clip


def test_any_split_into_micro_batches_gives_the_same_run(make, tmp_path):
    weights, losses = [], []
    for size in (1, 2, 3, 5, None):
        run = make(f"{size}", micro_batch_size=size, dropout=0.0, loss=double_loss, double=True)
        run.run()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
        losses.append([record["loss"] for record in metrics(tmp_path / f"{size}") if "loss" in record])
    for weight, loss in zip(weights, losses, strict=True):
        torch.testing.assert_close(weight, weights[0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(loss, losses[0], rtol=1e-10)


def test_micro_batches_change_nothing_material_in_fp32(make, tmp_path):
    for size in (1, 5):
        make(f"{size}", micro_batch_size=size, dropout=0.0, max_steps=3).run()
    one, five = ([r["loss"] for r in metrics(tmp_path / name) if "loss" in r] for name in ("1", "5"))
    np.testing.assert_allclose(one, five, rtol=1e-6)


def test_the_same_seed_gives_the_same_run_and_another_does_not(make, tmp_path, kind):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        make(name, optimizer=kind, seed=seed).run()
    assert_same(tmp_path / "one", outcome(tmp_path / "two"))
    assert outcome(tmp_path / "one")["model.safetensors"] != outcome(tmp_path / "three")["model.safetensors"]


def test_dropout_differs_between_steps_and_micro_batches_but_not_between_runs(make):
    """A dropout seeded alike for each step would drop the same channels throughout the run."""
    seen: list[int] = []

    def noting(model, batch):
        seen.append(torch.initial_seed())
        return causal_lm_loss(model, batch)

    for name in ("one", "two"):
        make(name, loss=noting, eval_every=0, max_steps=4).run()
    validation = {seed for seed in seen if seen.count(seed) > 2}
    trained = [seed for seed in seen if seed not in validation]
    half = len(trained) // 2
    assert trained[:half] == trained[half:] and len(set(trained[:half])) == half >= 11


def test_the_model_that_is_saved_is_the_one_that_was_trained(make, tmp_path):
    run = make("run")
    run.run()
    assert run.step == STEPS
    newest = checkpoint.newest_good(tmp_path / "run")
    for name, parameter in load_model(tmp_path / "run").named_parameters():
        assert torch.equal(parameter, run.model.get_parameter(name)) and torch.equal(parameter, newest.model[name])


def test_best_is_the_model_of_the_least_validation_loss(make, tmp_path):
    """At this rate the model soon learns its samples by heart: the last is not the best."""
    run = make("run", max_steps=40, eval_every=5, save_every=5, keep_checkpoints=100, dropout=0.0, learning_rate=0.05)
    run.run()
    validations = {record["step"]: record["val_loss"] for record in metrics(tmp_path / "run") if "val_loss" in record}
    best = min(validations, key=validations.get)
    assert best != max(validations)
    at_best = checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-{best:08d}")
    assert at_best.state["best_val_loss"] == validations[best]
    for name, parameter in load_model(tmp_path / "run" / "best").named_parameters():
        assert torch.equal(parameter, at_best.model[name])


def test_the_validation_loss_is_that_of_all_tokens_and_leaves_training_mode_on(make, tmp_path):
    run = make("run", max_steps=2)
    run.run()
    samples = run.val
    with torch.no_grad():
        logits = load_model(tmp_path / "run")(torch.from_numpy(samples.ids))
    expected = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(samples.labels).flatten(), ignore_index=IGNORED)
    assert metrics(tmp_path / "run")[-1]["val_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert run.model.training


# ---- numbers that are none ----------------------------------------------------------------------------------------------


def spoilt(at_step: int, spoil):
    calls = 0

    def loss(model, batch) -> Loss:
        nonlocal calls
        calls += model.training
        result = causal_lm_loss(model, batch)
        return spoil(model, result) if model.training and calls == (at_step - 1) * 3 + 2 else result

    return loss


def infinite_gradient(model, result: Loss) -> Loss:
    weight = model.norm.weight
    return Loss(result.sum + (weight - weight.detach()).abs().sqrt().sum(), result.weight)  # value + 0, slope infinite


SPOILERS = {
    "nan": lambda model, result: Loss(result.sum * math.nan, result.weight),
    "inf": lambda model, result: Loss(result.sum * math.inf, result.weight),
    "gradient": infinite_gradient,
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_a_number_that_is_none_stops_the_run_before_it_reaches_the_weights(make, tmp_path, kind, reference, spoiler):
    run = make("run", optimizer=kind, loss=spoilt(5, SPOILERS[spoiler]))
    with pytest.raises(VerificationError) as caught:
        run.run()
    message = str(caught.value)
    assert caught.value.exit_code == 70 and "step 5" in message
    assert all(f"row {number}" in message for number in run.batches.numbers(4)) and "None" not in message
    good = make("good", optimizer=kind, loss=asking_to_stop(4))
    with pytest.raises(Interrupted):
        good.run()
    assert_same_state(run, good)  # which has taken four steps
    assert checkpoint.newest_good(tmp_path / "run").step == 3
    make("run", optimizer=kind).run()
    assert_same(tmp_path / "run", reference)


def assert_same_state(run: Trainer, other: Trainer) -> None:
    for name, parameter in other.model.named_parameters():
        assert torch.equal(run.model.get_parameter(name), parameter), name
    for mine, others in zip(run.optimizers, other.optimizers, strict=True):
        for state, twin in zip(mine.state.values(), others.state.values(), strict=True):
            assert all(torch.equal(state[key], twin[key]) for key in twin)


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_without_clipping_such_a_number_is_found_as_well(make, tmp_path, spoiler):
    with pytest.raises(VerificationError, match="step 2"):
        make("run", max_grad_norm=0.0, save_every=1, loss=spoilt(2, SPOILERS[spoiler])).run()
    assert all(tensor.isfinite().all() for tensor in checkpoint.newest_good(tmp_path / "run").model.values())


def test_a_weight_that_is_no_number_stops_the_run(make, tmp_path):
    run = make("run")
    with torch.no_grad():
        run.model.layers[1].mlp.up_proj.weight[3, 2] = math.nan
    with pytest.raises(VerificationError, match="step 1: loss nan"):
        run.run()
    assert checkpoint.newest_good(tmp_path / "run") is None and not (tmp_path / "run" / "model.safetensors").exists()


def test_a_batch_without_a_supervised_token_is_refused_rather_than_learnt_as_zero(make, tmp_path):
    run = make("run")
    run.batches.samples.labels[run.batches.numbers(2)] = IGNORED
    with pytest.raises(VerificationError, match="step 3: no supervised token"):
        run.run()


# ---- groups, rates, precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_are_decayed_and_every_weight_is_trained_once(make, kind, tied):
    run = make("run", optimizer=kind, tie_word_embeddings=tied, qk_norm=True)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    groups = [(type(o).__name__, group) for o in make_optimizers(run.model, run.config, CPU) for group in o.param_groups]
    found = [names[parameter] for _, group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())
    for optimizer, group in groups:
        for name in (names[parameter] for parameter in group["params"]):
            in_a_layer = name.endswith("_proj.weight")
            assert group["weight_decay"] == (0.1 if in_a_layer or name == "lm_head.weight" else 0.0), name
            assert optimizer == ("Muon" if kind == "muon" and in_a_layer else "AdamW"), name


def test_muon_takes_attention_s_heads_for_themselves(make):
    run = make("run", optimizer="muon", num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    heads = {names[parameter].split(".", 2)[2]: cut for parameter, cut in run.optimizers[1].heads.items()}
    assert heads == {
        "self_attn.q_proj.weight": (0, 6),
        "self_attn.k_proj.weight": (0, 6),
        "self_attn.o_proj.weight": (1, 6),
    }
    assert len(run.optimizers[1].heads) == 6


def test_each_kind_of_weight_may_have_a_rate_of_its_own(make, kind):
    own = {"query_key_learning_rate": 0.01, "embedding_learning_rate": 0.3, "head_learning_rate": 0.0}
    run = make(
        "run",
        optimizer=kind,
        tie_word_embeddings=False,
        learning_rate=0.1,
        qk_norm=True,
        max_steps=4,
        warmup_fraction=0.5,
        **own,
    )
    run.optimizer_step(run.batches.at(0))  # half way up
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    rates = {names[p]: group["lr"] for o in run.optimizers for group in o.param_groups for p in group["params"]}
    for name, rate in rates.items():
        part = name.split(".")[-2]
        wanted = {"q_proj": 0.01, "k_proj": 0.01, "embed_tokens": 0.3, "lm_head": 0.0}.get(part, 0.1)
        assert rate == pytest.approx(wanted / 2), name
    left_out = make("other", optimizer=kind, tie_word_embeddings=False)
    assert {group["lr_factor"] for o in left_out.optimizers for group in o.param_groups} == {1.0}


def test_muon_s_momentum_rises(make):
    config = PretrainConfig(momentum=0.95, momentum_warmup=10)
    assert [momentum_at(step, config) for step in (0, 5, 10, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum_at(0, PretrainConfig(momentum=0.95, momentum_warmup=0)) == 0.95
    assert momentum_at(3, PretrainConfig(momentum=0.5, momentum_warmup=10)) == 0.5
    run = make("run", optimizer="muon", momentum_warmup=4, max_steps=4)
    run.optimizer_step(run.batches.at(0))
    assert run.optimizers[1].param_groups[0]["momentum"] == 0.85


def test_weights_that_are_frozen_are_left_alone(make):
    run = make("run")
    run.model.norm.weight.requires_grad_(False)
    trained = [p for o in make_optimizers(run.model, run.config, CPU) for group in o.param_groups for p in group["params"]]
    assert all(parameter is not run.model.norm.weight for parameter in trained)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_learning_rate_rises_stays_and_falls(schedule):
    for steps, warmup, final in itertools.product((2, 3, 10, 333), (0.0, 0.02, 0.3), (0.0, 0.1, 1.0)):
        config = PretrainConfig(learning_rate=0.5, schedule=schedule, warmup_fraction=warmup, final_lr_fraction=final)
        rates = [lr_at(step, steps, config) for step in range(steps)]
        risen = math.ceil(warmup * steps)
        assert rates[:risen] == pytest.approx([0.5 * (step + 1) / risen for step in range(risen)])
        assert rates[0] > 0 and rates[-1] == pytest.approx(0.5 * final) and all(0 <= rate <= 0.5 for rate in rates)
        assert all(one >= next for one, next in itertools.pairwise(rates[risen:]))
        assert final == 1.0 or rates[-1] < rates[-2]
        if schedule == "wsd" and steps == 333:
            falling = math.ceil(0.4 * steps)
            assert rates[risen : steps - falling] == [0.5] * (steps - falling - risen) and rates[steps - falling] <= 0.5
        if schedule == "cosine" and steps == 333:
            middle = risen + (steps - risen) // 2 - 1
            assert rates[middle] == pytest.approx(0.5 * (final + (1 - final) * 0.5), rel=0.02)


def test_the_rate_of_each_step_reaches_every_optimizer(make, tmp_path, kind):
    run = make("run", optimizer=kind)
    run.run()
    logged = [record["lr"] for record in metrics(tmp_path / "run") if "lr" in record]
    assert logged == [lr_at(step, STEPS, run.config) for step in range(STEPS)]
    assert {group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups} == {logged[-1]}


def test_the_precision_is_what_is_asked_for_or_what_the_hardware_multiplies(make, monkeypatch):
    assert make("run", precision="fp32").precision == "fp32" and make("run", precision="bf16").precision == "bf16"
    for multiplies, picked in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("etude.device._cpu_multiplies_bf16", lambda multiplies=multiplies: multiplies)
        assert make("run", precision="auto").precision == picked
        assert pick_precision("fp32", CPU) == "fp32"
    with pytest.raises(UsageError, match="fp16"):
        make("run", precision="fp16")


def test_in_bf16_the_weights_stay_in_fp32_and_no_loss_is_scaled(make, tmp_path):
    run = make("run", precision="bf16", max_steps=2)
    run.run()
    assert run.gradients.scaler is None  # scaling is for fp16 alone
    found = checkpoint.newest_good(tmp_path / "run")
    assert {tensor.dtype for tensor in (*found.model.values(), *found.optimizer.values())} == {torch.float32}


def test_more_processes_than_rows_are_refused(make, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UsageError, match=r"batch_size \(5\) must be at least the number of processes \(6\)"):
        make("run")


def test_metrics_are_one_json_object_a_line_with_the_numbers_of_a_step(make, tmp_path):
    make("run", log_every=3).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in lines if "loss" in record]
    assert [record["step"] for record in steps] == [3, 6, 8]  # the last step always
    expected = {"step", "loss", "grad_norm", "lr", "supervised_tokens", "tokens_per_second", "tokens", "seconds"}
    assert all(record.keys() == expected for record in steps)
    assert [record["tokens"] for record in steps] == [step * 5 * Rows.block_size for step in (3, 6, 8)]


def test_nothing_here_needs_the_trainer_to_hold_more_than_one_batch_ahead(make, monkeypatch):
    """The batches are asked for once each, in order: resuming at step k reads none before k."""
    run = make("run", max_steps=5)
    asked, at = [], run.batches.at
    run.batches.at = lambda step: (asked.append(step), at(step))[1]
    run.step = 2
    monkeypatch.setattr(resume, "go_on", lambda run: "")
    run.run()
    assert asked == [2, 3, 4]
    assert isinstance(run.batches.at(0)["ids"], Tensor) and trainer.AUTO_MICRO_BATCH_TOKENS > 0


# ---- on a GPU -----------------------------------------------------------------------------------------------------------

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("device", "precision", "compile", "close"),
    [
        ("cpu", "bf16", "off", 2e-2),  # so that the test itself is seen to pass where there is no GPU
        pytest.param("auto", "fp32", "off", 1e-4, marks=GPU),
        pytest.param("cuda", "bf16", "on", 2e-2, marks=GPU),
        pytest.param("cuda:0", "fp16", "off", 2e-2, marks=GPU),
    ],
)
def test_a_gpu_trains_as_a_cpu_does_and_resumes_exactly(make, tmp_path, monkeypatch, device, precision, compile, close):
    settings = {"dropout": 0.0, "hidden_size": 32}  # rotary pairs of 8: what CUDA's attention asks for
    make("cpu", **settings).run()
    settings |= {"device": device, "precision": precision, "compile": compile, "deterministic": True}
    make("whole", **settings).run()
    first = make("halves", **settings)
    plain = first.optimizer_step

    def step(batch):
        if first.step == 2:  # in the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(batch)

    monkeypatch.setattr(first, "optimizer_step", step)
    with pytest.raises(Interrupted, match="after step 3"):
        first.run()
    make("halves", **settings).run()
    assert_same(tmp_path / "halves", {name: outcome(tmp_path / "whole")[name] for name in ("tensors", "model.safetensors")})
    on_cpu, on_gpu = ([r["loss"] for r in metrics(tmp_path / name) if "loss" in r] for name in ("cpu", "whole"))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=close)
    assert on_gpu[-1] < on_gpu[0]


def test_damaged_metrics_are_told_kept_aside_and_do_not_end_the_run(make, tmp_path, capsys):
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(5)).run()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:1], b"\xff\xfe garbage\n", *lines[1:], b"[1]\n", b'{"step": 5, "lo'])
    path.write_bytes(damaged)
    capsys.readouterr()
    make("run").run()
    assert f"{path}:2: 2 damaged lines are left out; the file as it was is kept as {path}.damaged" in capsys.readouterr().err
    assert Path(f"{path}.damaged").read_bytes() == damaged
    make("whole").run()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
