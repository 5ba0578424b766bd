"""Checkpoints under faults: whatever crashes, is cut, flipped or missing, a run finds its newest whole state or says why not.

Crashes are real: a forked child ends with ``os._exit`` or SIGKILL, before or in the middle of a write.
"""

import ast
import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from etude.errors import DataError, MismatchError, StorageError
from etude.losses import causal_lm_loss
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.training import checkpoint
from etude.training.checkpoint import MANIFEST, found_in, load, newest_good, prune, restore, set_aside, snapshot, write
from etude.training.config import PretrainConfig
from etude.training.optim import make_optimizers
from etude.weights import load_model, save_model

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")

KILLED = 42  # exit code of a child that a test ended


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kind: str = "adamw", seed: int = 0, **shape):
    """A tiny model and its optimizers."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, **shape}
    model = Etude(EtudeConfig(vocab_size=40, max_position_embeddings=8, **sizes))
    return model, make_optimizers(model, PretrainConfig(optimizer=kind, learning_rate=0.01), torch.device("cpu"))


def train(model, optimizers, steps: int) -> None:
    """Some steps on random ids, drawn from torch's global generator: what is learnt shows whether that came back, too."""
    for _ in range(steps):
        ids = torch.randint(40, (2, 9))
        causal_lm_loss(model, {"ids": ids[:, :-1], "labels": ids[:, 1:]}).sum.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def states(model, optimizers) -> dict[str, torch.Tensor]:
    """Every tensor that training changes."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {name: parameter.detach().clone() for parameter, name in names.items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state.items():
            found |= {f"{number}/{key}/{names[parameter]}": tensor.clone() for key, tensor in values.items()}
    return found


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def in_child(body) -> int:
    """Run ``body()`` in a forked child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, no second pytest goes on from here
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- a round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_all_comes_back_exactly_and_training_goes_on_as_if_nothing_had_been(tmp_path, kind, tied):
    model, optimizers = make(kind, tie_word_embeddings=tied)
    train(model, optimizers, 3)
    state = {"step": 3, "identity": {"text": "春"}, "none": None, "number": 0.1}
    path = write(tmp_path, snapshot(state, model, optimizers), keep=1)
    kept = states(model, optimizers)
    assert path == tmp_path / "checkpoints" / "step-00000003"
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, MANIFEST])

    other, other_optimizers = make(kind, seed=1, tie_word_embeddings=tied)
    torch.manual_seed(99)
    found = load(path)
    assert found.step == 3 and {key: found.state[key] for key in state} == state
    restore(found, other, other_optimizers)
    assert_same(states(other, other_optimizers), kept)

    restored_rng = torch.get_rng_state()
    restore(load(path), model, optimizers)
    assert torch.equal(torch.get_rng_state(), restored_rng)
    train(model, optimizers, 3)
    restore(load(path), other, other_optimizers)
    train(other, other_optimizers, 3)
    assert_same(states(other, other_optimizers), states(model, optimizers))


def test_weights_bear_hugging_faces_names_and_frozen_ones_stay_out(tmp_path):
    model, _ = make(tie_word_embeddings=False)
    model.embed_tokens.weight.requires_grad_(False)
    optimizers = make_optimizers(model, PretrainConfig(), torch.device("cpu"))
    train(model, optimizers, 1)
    found = load(write(tmp_path, snapshot({"step": 1}, model, optimizers), keep=1))
    assert found.model.keys() == {name for name, _ in model.named_parameters()} - {"embed_tokens.weight"}
    on_disk = checkpoint.read_safetensors(found.path / "model.safetensors").keys()
    assert {"lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"} <= on_disk
    restore(found, model, optimizers)


def test_a_number_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    model, optimizers = make()
    with pytest.raises(ValueError):
        write(tmp_path, snapshot({"step": 1, "best": float("inf")}, model, optimizers), keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: {"model": {k: v for k, v in found.model.items() if k != "norm.weight"}}, "norm.weight"),
        (lambda found: {"model": {**found.model, "extra.weight": torch.ones(1)}}, "extra.weight"),
        (lambda found: {"model": {**found.model, "norm.weight": torch.ones(3)}}, r"norm.weight is \(3,\)"),
        (lambda found: {"model": {**found.model, "norm.weight": torch.ones(16).half()}}, "float16"),
        (lambda found: {"optimizer": without(found.optimizer, "/norm.weight")}, "missing, the first: norm.weight"),
        (lambda found: {"optimizer": without(found.optimizer, "exp_avg/norm.weight")}, "exp_avg"),
        (lambda found: {"optimizer": {}}, "missing"),
        (lambda found: {"optimizer": {**found.optimizer, "muon/momentum_buffer/norm.weight": torch.ones(16)}}, "muon"),
        (lambda found: {"optimizer": {**found.optimizer, "adamw/step/extra.weight": torch.ones(())}}, "extra.weight"),
        (lambda found: {"optimizer": {**found.optimizer, "adamw/exp_avg/norm.weight": torch.ones(3)}}, "norm.weight"),
    ],
)
def test_state_that_does_not_fit_is_refused(tmp_path, change, message):
    model, optimizers = make()
    train(model, optimizers, 1)
    found = load(write(tmp_path, snapshot({"step": 1}, model, optimizers), keep=1))
    with pytest.raises(MismatchError, match=message):
        restore(dataclasses.replace(found, **change(found)), *make())


def without(tensors: dict, ending: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


@pytest.mark.parametrize("saved, used", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_is_refused(tmp_path, saved, used):
    model, optimizers = make(saved)
    train(model, optimizers, 1)
    found = load(write(tmp_path, snapshot({"step": 1}, model, optimizers), keep=1))
    with pytest.raises(MismatchError, match="state"):
        restore(found, *make(used))


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    path = save_step(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "schema_version": 99}))
    seal(path)
    with pytest.raises(MismatchError, match="schema_version 99 → 2"):
        load(path)


# ---- crashes ------------------------------------------------------------------------------------------------------------


def save_step(run: Path, step: int, keep: int = 2) -> Path:
    """A checkpoint every part of which tells its step, so that a mixture of two would show."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for tensor in (model.weight, *optimizer.state[model.weight].values()):
            tensor.fill_(step)
    torch.manual_seed(step)
    return write(run, snapshot({"step": step}, model, [optimizer]), keep)


def assert_whole(found: checkpoint.Checkpoint) -> None:
    for tensor in (*found.model.values(), *found.optimizer.values()):
        assert (tensor == found.step).all()
    rng = torch.Generator().manual_seed(found.step).get_state()
    assert torch.equal(found.rng["cpu"], rng) and found.path.name == f"step-{found.step:08d}"


EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "fsync", "torn write"}


def crash_at(number: int, body) -> None:
    """Run ``body`` and leave the process at its ``number``-th call that touches the disk, or in the middle of a write."""
    import safetensors.torch

    count = 0

    def note(event: str, arguments=()) -> None:
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == number:
                os._exit(KILLED)

    fsync, save_file, write_text = os.fsync, safetensors.torch.save_file, Path.write_text

    def torn_save_file(tensors, path, **keywords):
        note("open")
        save_file(tensors, path, **keywords)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        note("torn write")
        Path(path).write_bytes(whole)

    def torn_write_text(path, text, **keywords):
        write_text(path, text[: len(text) // 2], **keywords)
        note("torn write")
        return write_text(path, text, **keywords)

    def noting_fsync(descriptor):
        note("fsync")
        fsync(descriptor)

    os.fsync, safetensors.torch.save_file, Path.write_text = noting_fsync, torn_save_file, torn_write_text
    sys.addaudithook(note)
    body()


def test_a_crash_at_any_call_leaves_the_old_checkpoint_or_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counted, but not waited for
    seen, number, before = set(), 0, tmp_path / "before"
    for step in (9, 10):
        save_step(before, step)
    while True:
        number += 1
        run = tmp_path / f"{number}"
        shutil.copytree(before, run)
        code = in_child(lambda run=run, number=number: crash_at(number, lambda: save_step(run, 100)))
        assert code in (0, KILLED)
        found = newest_good(run)
        assert_whole(found)
        seen.add(found.step)
        assert found.step == (100 if (run / "checkpoints" / "step-00000100").is_dir() else 10)
        for path in found_in(run):
            assert_whole(load(path))  # nothing that bears a checkpoint's name is half there
        save_step(run, 101, keep=1)
        assert os.listdir(run / "checkpoints") == ["step-00000101"]  # what the crash left is gone
        shutil.rmtree(run)
        if code == 0:
            break
    assert number > 30 and seen == {10, 100}


def test_the_old_checkpoint_goes_only_after_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut forgets what was not synced: with ``keep`` 1, the new checkpoint's name must be on the disk first."""
    save_step(tmp_path, 1, keep=1)
    folder, synced = tmp_path / "checkpoints", []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def noting_sync(descriptor):
        fsync(descriptor)
        if os.fstat(descriptor).st_ino == folder.stat().st_ino:
            synced.append((folder / "step-00000002").is_dir())

    def checked_rename(source, *arguments, **keywords):
        assert Path(source).name != "step-00000001" or True in synced
        rename(source, *arguments, **keywords)

    def checked_rmtree(path, *arguments, **keywords):
        assert Path(path).name != "step-00000001", "half-deleted, it would bear a checkpoint's name"
        rmtree(path, *arguments, **keywords)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "rename", checked_rename)
    monkeypatch.setattr(shutil, "rmtree", checked_rmtree)
    save_step(tmp_path, 2, keep=1)
    assert [path.name for path in found_in(tmp_path)] == ["step-00000002"]


def test_a_full_disk_is_told_as_such_and_keeps_the_old_checkpoint(tmp_path):
    save_step(tmp_path, 1)

    def body():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))  # bytes a file may have; Python then gets EFBIG
        try:
            save_step(tmp_path, 2)
        except StorageError as error:
            assert "model.safetensors" in str(error) and "free some space" in str(error)
            os._exit(error.exit_code)

    assert in_child(body) == 74
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    assert_whole(newest_good(tmp_path))


def test_killed_twenty_times_while_saving_the_newest_always_loads_and_no_step_is_lost(tmp_path):
    source, newest = random.Random(0), 0
    for trial in range(20):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            step = newest
            while True:
                step += 1
                save_step(tmp_path, step)
                os.write(writer, step.to_bytes(8, "little"))
        os.close(writer)
        time.sleep(source.uniform(0.02, 0.07))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reader, "rb") as file:
            told = file.read()
        saved = int.from_bytes(told[-8:], "little") if told else newest
        found = newest_good(tmp_path)
        if found is None:
            assert saved == 0, f"trial {trial}"
            continue
        assert_whole(found)
        assert saved <= found.step <= saved + 1, f"trial {trial}"
        newest = found.step
    assert newest > 0
    save_step(tmp_path, newest + 1)
    left = [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]
    assert left == []


# ---- damage -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run with two good checkpoints, steps 1 and 2."""
    run = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save_step(run, step)
    return run


def damages(name: str):
    """(what, function of a path) of everything that may befall the file ``name``."""
    source = random.Random(name)

    def flip(path: Path, fraction: float, bit: int) -> None:
        data = bytearray(path.read_bytes())
        data[min(len(data) - 1, int(fraction * len(data)))] ^= 1 << bit
        path.write_bytes(data)

    for number in range(20):
        fraction, bit = (0.0, 0) if number == 0 else (source.random(), source.randrange(8))
        yield f"bit {bit} flipped at {fraction:.2f}", lambda path, fraction=fraction, bit=bit: flip(path, fraction, bit)
    yield "truncated", lambda path: path.write_bytes(path.read_bytes()[:-5])
    yield "lengthened", lambda path: path.write_bytes(path.read_bytes() + b"\n ")
    yield "emptied", lambda path: path.write_bytes(b"")
    yield "missing", lambda path: path.unlink()


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damage_is_found_named_and_answered_with_the_checkpoint_before(two, tmp_path, capsys, name):
    for what, damage in damages(name):
        run = tmp_path / "run"
        shutil.copytree(two, run)
        path = run / "checkpoints" / "step-00000002"
        damage(path / name)
        if (what, name) == ("lengthened", MANIFEST):  # blanks after the JSON say nothing different
            assert load(path).step == 2
        else:
            with pytest.raises(DataError) as caught:
                load(path)
            # A digest changed in the manifest accuses the file it is of; which of the two is wrong cannot be told.
            assert str(path / name) in str(caught.value) or (name == MANIFEST and str(path) in str(caught.value)), what
            capsys.readouterr()
            found = newest_good(run)
            assert found.step == 1
            assert_whole(found)
            warning = capsys.readouterr().err
            assert warning.startswith("warning: ") and str(path) in warning and warning.count("\n") == 1, what
        shutil.rmtree(run)


def test_without_a_usable_checkpoint_every_reason_is_told_and_nothing_starts_over(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    (run / "checkpoints/step-00000001/model.safetensors").unlink()
    (run / "checkpoints/step-00000002/state.json").write_text("{}")
    with pytest.raises(MismatchError) as caught:
        newest_good(run)
    message = str(caught.value)
    assert "step-00000001/model.safetensors: missing" in message and "step-00000002/state.json: damaged" in message
    assert "--resume never" in message and caught.value.exit_code == 78


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest_good(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-00000001.x.tmp").mkdir()
    assert newest_good(tmp_path) is None and set_aside(tmp_path) is None


# ---- which is newest, and which go --------------------------------------------------------------------------------------


def test_order_is_by_number_and_other_names_are_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    steps = [9, 10, 100, 99_999_999, 100_000_000]  # the last has a digit more, and sorts before the others as text
    others = ["step-12", "step-abc", "step-00000001.bak", "best", "step-00000100-copy"]
    for name in [*(f"step-{step:08d}" for step in steps), *others]:
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    (folder / "step-00000005").write_text("a file, not a folder")
    for left_behind in (".step-00000010.abc.tmp", ".step-00000009.deleted.tmp", ".step-00000009.abc.old.tmp"):
        (folder / left_behind).mkdir()
        (folder / left_behind / "model.safetensors").write_text("half")
    (tmp_path / "checkpoints-before-1" / "step-00000009").mkdir(parents=True)
    (tmp_path / ".step.tmp").mkdir()  # not ours: beside the folder, not in it
    assert [int(path.name[5:]) for path in found_in(tmp_path)] == steps[::-1]
    prune(tmp_path, keep=3)
    assert sorted(os.listdir(folder)) == sorted([*(f"step-{step:08d}" for step in steps[2:]), *others, "step-00000005"])
    assert all((folder / name / "file").read_text() == name for name in others)
    assert sorted(os.listdir(tmp_path)) == [".step.tmp", "checkpoints", "checkpoints-before-1"]
    prune(tmp_path, keep=1)
    assert [path.name for path in found_in(tmp_path)] == ["step-100000000"]


def test_starting_over_renames_and_never_overwrites(tmp_path):
    for number in (1, 2):
        save_step(tmp_path, number)
        assert set_aside(tmp_path) == tmp_path / f"checkpoints-before-{number}"
        assert found_in(tmp_path) == []
    assert_whole(load(tmp_path / "checkpoints-before-1" / "step-00000001"))
    assert_whole(load(tmp_path / "checkpoints-before-2" / "step-00000002"))


# ---- nothing that is loaded can execute code ----------------------------------------------------------------------------


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return (exec, (f"open({self.canary!r}, 'w').close()",))


def seal(path: Path) -> None:
    """Write the manifest that fits the files: what an attacker would do."""
    (path / MANIFEST).write_text(json.dumps({name: checkpoint.sha256(path / name) for name in FILES}))


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_pickle_under_a_safetensors_name_is_refused_and_never_run(tmp_path, by_torch):
    canary = tmp_path / "canary"
    for name in FILES[:3]:
        path = save_step(tmp_path / name, 1)
        with open(path / name, "wb") as file:
            torch.save({"x": Bomb(canary)}, file) if by_torch else pickle.dump(Bomb(canary), file)
        seal(path)
        with pytest.raises(DataError, match=name):
            load(path)
    model, _ = make()
    save_model(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"x": Bomb(canary)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(MismatchError, match=r"model\.safetensors"):  # no falling back to another format
        load_model(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").rename(tmp_path / "model" / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_model(tmp_path / "model")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))  # noqa: S301
    assert canary.exists()  # the bomb does work


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "np.load",
                "numpy.load", "dcp.load", "eval", "exec"}  # fmt: skip
UNSAFE_ARGUMENTS = {("trust_remote_code", True), ("weights_only", False), ("allow_pickle", True)}


def test_the_package_has_no_way_to_run_what_it_reads():
    found = []
    for path in sorted(file for folder in ("etude", "train", "tool", "inference") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found += [f"{path}:{node.lineno} import {m}" for m in modules if m.split(".")[0] in UNSAFE_MODULES]
                found += [f"{path}:{node.lineno} import {m}" for m in modules if m.startswith("torch.distributed.checkpoint")]
            if isinstance(node, ast.Call):
                if ast.unparse(node.func) in UNSAFE_CALLS:
                    found.append(f"{path}:{node.lineno} {ast.unparse(node.func)}")
                given = {(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
                found += [f"{path}:{node.lineno} {argument}" for argument in given & UNSAFE_ARGUMENTS]
    assert found == []
