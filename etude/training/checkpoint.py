"""Checkpoints that are whole or absent, and proved so before they are loaded.

``checkpoints/step-00001000/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``rng.safetensors``, ``state.json``
and, written last, ``manifest.json`` with the SHA-256 of the others. It is made in a temporary folder, synced and renamed.
Nothing in it can execute code when it is loaded: safetensors and JSON only.

A model that is divided over processes is written by all of them, each its rows: ``model-00001-of-00002.safetensors`` … and
``optimizer-00001-of-00002.safetensors`` …, which put one below the other are the whole. Any number of processes can load it.
"""

import copy
import hashlib
import json
import re
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etude.errors import DataError, EtudeError, MismatchError, StorageError
from etude.files import sync, whole_folder
from etude.parallel import Processes
from etude.training.muon import Muon
from etude.training.sharding import divided_like, local
from etude.weights import from_disk_name, read_json, read_safetensors, to_disk_name, write_safetensors

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
PART = re.compile(r"model-\d{5}-of-(?!00000)(\d{5})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on. Tensors are on the CPU, in the dtype they were trained in."""

    path: Path
    state: dict[str, Any]  # "step" and whatever the trainer keeps: JSON values only
    model: dict[str, Tensor]  # parameter name → weight
    optimizer: dict[str, Tensor]  # "<optimizer>/<key>/<parameter name>" → state
    rng: dict[str, Tensor]  # "cpu", "cuda.0", … → generator state, uint8

    @property
    def step(self) -> int:
        return self.state["step"]


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, in tensors of its own on the CPU: what training does later does not reach it."""

    state: dict[str, Any]
    model: dict[str, Tensor]  # by the names they have on disk; of a divided model, this process's rows
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    shards: int  # how many parts there are


def snapshot(state: dict[str, Any], model: nn.Module, optimizers: list[torch.optim.Optimizer], parts: int = 1) -> Snapshot:
    """Copy what a checkpoint holds, of a model in ``parts`` this process's. Only trainable weights are stored."""
    weights = {
        to_disk_name(name): _copied(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    optimizer = _optimizer_tensors(model, optimizers)
    return Snapshot(copy.deepcopy(state), weights, optimizer, _rng_tensors(), parts)


def write(run: str | Path, taken: Snapshot, keep: int, processes: Processes | None = None) -> Path:
    """Write the checkpoint of a snapshot's step, then delete all but the newest ``keep``.

    Of a divided model every one of ``processes`` has to come here with its own snapshot; the first completes the checkpoint
    when it knows all parts to be on the disk, and all return only then.
    """
    target = Path(run) / "checkpoints" / f"step-{taken.state['step']:08d}"
    processes = processes if processes and taken.shards > 1 else Processes()
    with processes.failing_together():
        if not processes.is_first:
            folder = Path(processes.heard("checkpoint folder"))
            if processes.rank < taken.shards:  # others have the same parts once more
                processes.tell("checkpoint part", json.dumps(_write_part(taken, folder, processes.rank)))
            processes.heard("checkpoint")
            return target
        with whole_folder(target) as folder, processes.failing_together():  # told before the folder goes
            processes.tell("checkpoint folder", str(folder.absolute()))
            digests = _write_part(taken, folder, rank=0)
            for rank in range(1, taken.shards):
                digests |= json.loads(processes.heard("checkpoint part", rank))
            write_safetensors(taken.rng, folder / "rng.safetensors")
            text = json.dumps({"schema_version": SCHEMA_VERSION, **taken.state}, indent=2, ensure_ascii=False, allow_nan=False)
            (folder / "state.json").write_text(text + "\n", encoding="utf-8")
            digests |= {name: sha256(folder / name) for name in ("rng.safetensors", "state.json")}
            (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        processes.tell("checkpoint", str(target))
    prune(run, keep)
    return target


def _write_part(taken: Snapshot, folder: Path, rank: int) -> dict[str, str]:
    """Write one process's rows; the files' SHA-256 by name. They are on the disk when this returns."""
    digests = {}
    for stem, tensors in (("model", taken.model), ("optimizer", taken.optimizer)):
        path = folder / part_names(stem, taken.shards)[rank]
        write_safetensors(tensors, path)
        sync(path)
        digests[path.name] = sha256(path)
    return digests


def part_names(stem: str, count: int) -> list[str]:
    """The files that hold the model, or the optimizer, in ``count`` parts."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{part:05d}-of-{count:05d}.safetensors" for part in range(1, count + 1)]


class Saver:
    """Writes checkpoints while training goes on: a step waits only for the copy. One is under way at a time.

    An error of a write is raised by the next :meth:`save` or :meth:`wait`; the checkpoints before it are whole.
    """

    def __init__(self, run: str | Path, keep: int, processes: Processes | None = None):
        self._run, self._keep, self._processes = run, keep, processes
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[Path] | None = None

    def save(self, taken: Snapshot) -> None:
        self.wait()
        self._writing = self._thread.submit(write, self._run, taken, self._keep, self._processes)

    def wait(self) -> None:
        """Until the last checkpoint is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._thread.shutdown(wait=True)  # a run that ends with an error keeps the checkpoint that was under way
        if kind is not None and self._writing is not None and (error := self._writing.exception()):
            print(f"warning: the last checkpoint was not written: {error}", file=sys.stderr, flush=True)


def load(path: str | Path) -> Checkpoint:
    """Load one checkpoint. Raises :class:`DataError` naming the file that is missing, altered or cut short."""
    path = Path(path)
    verify(path)
    state = read_json(path / "state.json")
    if state.get("schema_version") != SCHEMA_VERSION:
        raise MismatchError(
            f"{path}/state.json: schema_version {state.get('schema_version')} → {SCHEMA_VERSION}; "
            "the checkpoint was written by another version of Etude"
        )
    model, optimizer = (_read_parts(path, stem) for stem in ("model", "optimizer"))
    model = {from_disk_name(name): tensor for name, tensor in model.items()}
    return Checkpoint(path, state, model, optimizer, read_safetensors(path / "rng.safetensors"))


def _read_parts(path: Path, stem: str) -> dict[str, Tensor]:
    """Model or optimizer, put together from all parts. Numbers such as step counters are the same in each."""
    names = part_names(stem, _shards(read_json(path / MANIFEST)))
    parts = [read_safetensors(path / name) for name in names]
    if len(parts) == 1:
        return parts[0]
    for name, part in zip(names, parts, strict=True):
        counters = {
            key for key, tensor in part.items() if tensor.ndim == 0 and not torch.equal(tensor, parts[0].get(key, tensor))
        }
        if wrong := sorted((part.keys() ^ parts[0].keys()) | counters):
            raise DataError(f"{path / name}: not of the same step as {names[0]} ({wrong[0]} differs); restore the checkpoint")
    return {name: torch.cat([part[name] for part in parts]) if tensor.ndim else tensor for name, tensor in parts[0].items()}


def _shards(manifest: dict[str, str]) -> int:
    counts = {int(match[1]) for name in manifest if (match := PART.fullmatch(name))}
    return counts.pop() if len(counts) == 1 else 1


def verify(path: Path) -> None:
    """Compare every file with the manifest's SHA-256. Raises :class:`DataError` naming the first that differs."""
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path / MANIFEST}: missing, so the checkpoint is not complete")
    try:
        manifest = read_json(path / MANIFEST)
        count = _shards(manifest)
        parts = [*part_names("model", count), *part_names("optimizer", count)]
        expected = {name: manifest[name] for name in (*parts, "rng.safetensors", "state.json")}
    except (DataError, KeyError):
        raise DataError(f"{path / MANIFEST}: damaged") from None
    for name, digest in expected.items():
        if not (path / name).is_file():
            raise DataError(f"{path / name}: missing")
        found = sha256(path / name)
        if found != digest:
            raise DataError(f"{path / name}: damaged (SHA-256 is {found[:12]}…, the manifest says {str(digest)[:12]}…)")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def found_in(run: str | Path) -> list[Path]:
    """A run's checkpoints, newest first. Temporary folders and other names are none."""
    folder = Path(run) / "checkpoints"
    paths = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    numbered = [(int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_good(run: str | Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, with a warning for each newer one that isn't; None for a run without any.

    Raises :class:`MismatchError` when there are checkpoints but all are bad: never a silent fresh start.
    """
    reasons = []
    for path in found_in(run):
        try:
            checkpoint = load(path)
        except EtudeError as error:
            reasons.append(str(error))
            print(f"warning: {error}; trying the one before it", file=sys.stderr, flush=True)
            continue
        return checkpoint
    if reasons:
        raise MismatchError(f"no usable checkpoint in {run}: {'; '.join(reasons)}. Start over with --resume never")
    return None


def leftovers(run: str | Path) -> list[Path]:
    """What a process writes in a run's folder, and leaves there if it is killed meanwhile."""
    folders = (Path(run), Path(run) / "checkpoints", Path(run) / "best")
    return [path for folder in folders for path in sorted(folder.glob(".*.tmp"))]


def clean(run: str | Path) -> None:
    """Delete what a killed process left half-written in a run's folder. Only for whoever holds the run's lock."""
    for path in leftovers(run):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def require_room(run: str | Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], keep: int) -> None:
    """Raise :class:`StorageError` if the disk cannot hold what the run is going to write: now, rather than hours later."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    moments = sum(
        parameter.numel() * parameter.element_size() * (1 if isinstance(optimizer, Muon) else 2)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    there = sum(file.stat().st_size for path in found_in(run)[:keep] for file in path.iterdir() if file.is_file())
    # A new checkpoint is written before the oldest goes; besides, the model, the best model, and one of them being replaced.
    needed = (keep + 1) * (weights + moments) + 3 * weights - there
    free = shutil.disk_usage(Path(run)).free
    if free < needed:
        raise StorageError(
            f"{run}: the run will write about {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free; "
            "free some space, choose another --output, or lower --keep_checkpoints"
        )


def prune(run: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what an interrupted save left behind."""
    for path in (Path(run) / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in found_in(run)[keep:]:
        # Out of the way by one rename first: a half-deleted folder must never bear a checkpoint's name.
        doomed = path.with_name(f".{path.name}.deleted.tmp")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(run: str | Path, after: int = -1) -> Path | None:
    """Move checkpoints of steps later than ``after`` to a folder of their own, and return it (None: there are none).

    A run that starts over, or goes on from before them, would take them for its newest, and they would crowd out its own.
    """
    later = [path for path in found_in(run) if int(NAME.fullmatch(path.name)[1]) > after]
    if not later:
        return None
    number = 1
    while (aside := Path(run) / f"checkpoints-before-{number}").exists():
        number += 1
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    if after < 0:  # a run that starts over shares nothing with the old one, its best model and its figures included
        for name in ("best", "metrics.jsonl", "loss.png"):
            if (Path(run) / name).exists():
                (Path(run) / name).rename(aside / name)
    return aside


def restore(checkpoint: Checkpoint, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put a checkpoint's tensors into a model, its optimizers and the random generators, exactly."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parameters.keys() != checkpoint.model.keys():
        wrong = sorted(parameters.keys() ^ checkpoint.model.keys())
        raise MismatchError(f"{checkpoint.path}: {len(wrong)} weights do not fit the model, the first: {wrong[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            saved = checkpoint.model[name]
            if saved.shape != parameter.shape or saved.dtype != parameter.dtype:
                raise MismatchError(
                    f"{checkpoint.path}: {name} is {tuple(saved.shape)} {saved.dtype}, "
                    f"the model's is {tuple(parameter.shape)} {parameter.dtype}"
                )
            parameter.copy_(divided_like(saved, parameter))
    _restore_optimizers(checkpoint, model, optimizers)
    for name, tensor in checkpoint.rng.items():
        device, _, index = name.partition(".")
        if device == "cpu":
            torch.set_rng_state(tensor)
        elif torch.cuda.is_available() and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, int(index))


def _optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{type(optimizer).__name__.lower()}/{key}/{names[parameter]}": _copied(tensor)
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, tensor in values.items()
    }


def _restore_optimizers(checkpoint: Checkpoint, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    saved: dict[tuple[str, str], dict[str, Tensor]] = {}  # (optimizer, parameter name) → its state
    for full, tensor in checkpoint.optimizer.items():
        kind, key, name = full.split("/", 2)
        saved.setdefault((kind, name), {})[key] = tensor
    for optimizer in optimizers:
        kind = type(optimizer).__name__.lower()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = {index: saved.pop((kind, names[p]), None) for index, p in enumerate(parameters)}
        missing = [names[parameters[index]] for index, state in states.items() if state is None]
        if missing and checkpoint.step > 0:
            raise MismatchError(
                f"{checkpoint.path}: the {kind} state of {len(missing)} weights is missing, the first: {missing[0]}"
            )
        present = {index: state for index, state in states.items() if state is not None}
        keys = sorted({key for state in present.values() for key in state})
        for index, state in present.items():
            for key in keys:
                if key not in state or state[key].shape not in (parameters[index].shape, ()):
                    name = names[parameters[index]]
                    raise MismatchError(f"{checkpoint.path}: {kind}'s {key} of {name} is missing or of another shape")
        for index, state in present.items():
            present[index] = {
                key: divided_like(value, parameters[index]) if value.ndim else value for key, value in state.items()
            }
        # load_state_dict knows where each optimizer wants its step counters.
        optimizer.load_state_dict({"state": present, "param_groups": optimizer.state_dict()["param_groups"]})
    if saved:
        kind, name = sorted(saved)[0]
        raise MismatchError(f"{checkpoint.path}: {kind} state that fits no weight here, the first: {name}")


def _rng_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _copied(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).to("cpu", copy=True, memory_format=torch.contiguous_format)
