"""A run's checkpoints: is each whole, does it hold one moment of one run, and is the finished model the last one's."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from etude.doctor.model import look_at_weights
from etude.doctor.report import BAD, Report, some_of
from etude.errors import DataError, EtudeError, MismatchError
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.tokenizer import Tokenizer
from etude.training.checkpoint import MANIFEST, NAME, Checkpoint, found_in, leftovers, load, sha256
from etude.weights import build_model, from_disk_name, read_config_json, read_safetensors, to_disk_name

SHAPE = "model."  # begins the names of the model's config in a checkpoint's identity
STATE_KEYS = ("step", "steps", "identity", "spikes")


def look_at_checkpoints(run: Path, report: Report) -> Checkpoint | None:
    """Examine all of them, alone and beside each other; the newest good one."""
    look_for_leftovers(run, report)
    paths = found_in(run)
    if not paths:
        report.not_looked("checkpoints", f"there are none in {run / 'checkpoints'}")
        return None
    digests = {path: _digests(path) for path in paths}
    good: list[Path] = []
    newest: Checkpoint | None = None
    for path in paths:
        found = look_at_checkpoint(path, report, digests)
        if found is not None:
            good.append(path)
            # What is kept is kept to the end; the optimizer's state is twice the model, and has been looked at.
            newest = newest or dataclasses.replace(found, optimizer={}, rng={})
        found = None  # before the next is loaded: one in memory at a time
    with report.examining("checkpoints"):
        _look_for_twins(digests, good, newest, report)
    if newest is None:
        model = ", or begin a new run from the model that is there: --init_from " + str(run) if _is_whole(run) else ""
        report.bad(
            "checkpoints", f"none of {len(paths)} can be used, so the run cannot go on; start over with --resume never{model}"
        )
    elif newest.path != paths[0]:
        report.warn("checkpoints", f"the run would go on from {newest.path.name}; remove the newer bad ones, or let it do so")
    else:
        report.ok(
            "checkpoints", f"{len(good)} of {len(paths)} whole; the newest is at step {newest.step} of {newest.state['steps']}"
        )
    return newest


def _is_whole(folder: Path) -> bool:
    """Whether the weights of a model folder can be read, and are finite."""
    try:
        return all(tensor.isfinite().all() for tensor in read_safetensors(folder / "model.safetensors").values())
    except (EtudeError, OSError):
        return False


def look_for_leftovers(run: Path, report: Report) -> None:
    left = [str(path.relative_to(run)) for path in leftovers(run)]
    if left:
        report.warn(
            "leftovers",
            f"{len(left)} half-written files of a killed process: {some_of(left)}; the next start of the run removes them",
        )


def _digests(path: Path) -> dict[str, str]:
    """File name → SHA-256, as the manifest has it; nothing where it is unreadable, which is told elsewhere."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {str(name): digest for name, digest in manifest.items() if isinstance(digest, str)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def look_at_checkpoint(path: Path, report: Report, others: dict[Path, dict[str, str]] | None = None) -> Checkpoint | None:
    """Examine one checkpoint; None where it cannot be used."""
    before = report.count(BAD)
    found = None
    with report.examining(path.name):
        try:
            found = load(path)
        except DataError as error:
            raise DataError(
                f"{error}{_stranger(path, others or {})}; delete this checkpoint: a run goes on from the one before"
            ) from None
        _require_state(found)
        _look_at_step(found, report)
        _look_at_optimizer(found, report)
        look_at_weights(found.model, path.name, report)
        if broken := sorted(name for name, tensor in found.optimizer.items() if not tensor.isfinite().all()):
            report.bad(
                path.name, f"the optimizer's state is not finite: {some_of(broken)}; delete it, and lower --learning_rate"
            )
    return found if report.count(BAD) == before else None


def _stranger(path: Path, others: dict[Path, dict[str, str]]) -> str:
    """Whose file a damaged one is, if it is another checkpoint's: folders that were copied over each other."""
    for name, expected in others.get(path, {}).items():
        if Path(name).name != name or not (path / name).is_file() or (digest := sha256(path / name)) == expected:
            continue
        for other, digests in others.items():
            if other != path and digest in digests.values():
                return f": {name} is {other.name}'s, so the files of two steps were mixed"
    return ""


def _require_state(found: Checkpoint) -> None:
    missing = [key for key in STATE_KEYS if key not in found.state]
    if missing or type(found.state["step"]) is not int or not isinstance(found.state["identity"], dict):
        raise DataError(f"{found.path}/state.json: {', '.join(missing) or 'step or identity'} is missing or of another kind")


def _look_at_step(found: Checkpoint, report: Report) -> None:
    named = NAME.fullmatch(found.path.name)
    if named and int(named[1]) != found.step:
        report.bad(
            found.path.name,
            f"state.json is of step {found.step}, so the folder holds files of two steps, or was renamed; delete it",
        )


def _look_at_optimizer(found: Checkpoint, report: Report) -> None:
    """Optimizer state against the weights, by name and shape, and its step counters against the step.

    A manifest proves that files are as they were written together; somebody who remakes it over mixed files leaves these.
    """
    wrong, counters, covered = [], Counter(), set()
    for full, tensor in found.optimizer.items():
        kind, _, rest = full.partition("/")
        key, _, name = rest.partition("/")
        weight = found.model.get(name)
        if weight is None:
            wrong.append(f"{full} is of no weight here")
        elif tensor.ndim and tensor.shape != weight.shape:
            wrong.append(f"{full} is {tuple(tensor.shape)}, the weight {tuple(weight.shape)}")
        covered.add(name)
        if kind == "adamw" and key == "step":
            counters[int(tensor)] += 1
    if found.step and (missing := sorted(found.model.keys() - covered)):
        wrong.append(f"{len(missing)} weights have none, {missing[0]} among them")
    if wrong:
        report.bad(
            found.path.name,
            f"the optimizer's state does not fit the weights: {some_of(wrong)}; it is of another model; delete it",
        )
    spikes = found.state["spikes"]
    expected = found.step - len(spikes["skipped"])
    # Steps that overflow in fp16, or have all their rows in quarantine, make no update either, and are not counted.
    uncertain = bool(found.state.get("scaler") or spikes["quarantine"])
    off = [count for count in counters if count > expected or (count < expected and not uncertain)]
    if off or len(counters) > 1:
        told = ", ".join(str(count) for count in sorted(counters)[:4])
        report.bad(
            found.path.name,
            f"the optimizer has made {told} updates, state.json tells of {expected}: the files are of different steps; delete it",
        )


def _look_for_twins(
    digests: dict[Path, dict[str, str]], good: Sequence[Path], newest: Checkpoint | None, report: Report
) -> None:
    """One file in two checkpoints. Each step that is not left out changes the optimizer's state and the random generators', and,
    unless its learning rate is 0 as at the end of a schedule, the weights. fp16 leaves out steps that overflow, and doesn't count them.
    """
    if newest is None or newest.state.get("scaler") or any(newest.state["spikes"][key] for key in ("skipped", "quarantine")):
        return
    for path, other in combinations(digests, 2):  # the newer one first
        same = sorted(name for name, digest in digests[path].items() if digest == digests[other].get(name))
        if not (same := [name for name in same if name != "state.json"]):
            continue
        said = f"{' and '.join(same)} {'is the same file' if len(same) == 1 else 'are the same files'} as in {other.name}"
        if all(name.startswith("model") for name in same):
            report.warn(
                path.name, f"{said}: so it is when the learning rate was 0 in all steps between; if not, files were mixed"
            )
            continue
        wrong = [one.name for one in (path, other) if one not in good]
        cure = (
            f"delete {wrong[0]}, whose files do not agree with its state.json"
            if len(wrong) == 1
            else "what they hold does not tell which; a run can go on from an older one"
        )
        report.bad(path.name, f"{said}: of two steps only one can have them, so files were mixed; {cure}")


def look_at_outcome(run: Path, newest: Checkpoint, report: Report) -> None:
    """The model that a finished run leaves, which is its last checkpoint's, and the config it was trained with."""
    model = run / "model.safetensors"
    finished = newest.step == newest.state["steps"]
    if not model.is_file():
        if finished:
            report.warn("final model", "the run is done, but its model was not written; the same command again writes it")
        else:
            report.not_looked("final model", f"the run is at step {newest.step} of {newest.state['steps']}")
        return
    if finished:
        with report.examining("final model"):
            saved = {from_disk_name(name): tensor for name, tensor in read_safetensors(model).items()}
            names = newest.model.keys() & saved.keys()
            other = sorted(name for name in names if not torch.equal(saved[name], newest.model[name].float()))
            if other or not names:
                report.bad(
                    "final model",
                    f"model.safetensors is not what the last checkpoint ({newest.path.name}) holds: {len(other)} of {len(names)} weights "
                    f"differ{f', {other[0]} among them' if other else ''}; it was copied from elsewhere or is of an earlier run; "
                    "remove it, and the same training command writes it anew",
                )
            else:
                report.ok("final model", f"holds the weights of {newest.path.name}")
    elif (last := found_in(run)[0]) != newest.path:
        # What the run reached is known by the folder's name alone.
        report.not_looked(
            "final model",
            f"its checkpoint (step {int(NAME.fullmatch(last.name)[1])}) is damaged, so it cannot be compared; it may well be the "
            "finished one",
        )
    else:
        report.warn(
            "final model", f"older than the run, which is at step {newest.step} of {newest.state['steps']}; go on with it first"
        )
    with report.examining("final model"):
        _look_at_shape(read_config_json(run), newest, report)


def _look_at_shape(values: dict[str, Any], newest: Checkpoint, report: Report) -> None:
    """config.json against the shape that was trained. Weights of one size fit several: rope_theta, say, changes no shape."""
    trained = shape_of(newest).to_dict()
    changed = [name for name, value in trained.items() if values.get(name, value) != value]
    if not changed:
        return
    told = some_of([f"{name} {trained[name]} → {values[name]}" for name in changed], 6)
    if set(changed) <= {"max_position_embeddings", "rope_scaling", "dropout"}:  # what one changes to stretch the context
        report.warn("final model", f"config.json is not what was trained: {told}; continue pretraining with it before use")
    else:
        report.bad("final model", f"config.json is not what was trained: {told}; put the trained values back")


def shape_of(newest: Checkpoint) -> EtudeConfig:
    """The model's shape as a checkpoint tells it. Raises :class:`MismatchError` for one that doesn't."""
    shape = {name.removeprefix(SHAPE): value for name, value in newest.state["identity"].items() if name.startswith(SHAPE)}
    if "vocab_size" not in shape:
        raise MismatchError(f"{newest.path}/state.json: holds no shape of the model; restore it")
    return EtudeConfig.from_dict(shape)


def model_of(newest: Checkpoint) -> Etude:
    """The model as a checkpoint has it."""
    tensors = {to_disk_name(name): tensor for name, tensor in newest.model.items()}
    return build_model(shape_of(newest), tensors, "cpu", torch.float32, source=str(newest.path))


def look_at_fingerprint(newest: Checkpoint, tokenizer: Tokenizer, report: Report) -> None:
    """The tokenizer beside the model, or the one named, against the one that the run was trained with."""
    trained = newest.state["identity"].get("tokenizer")
    if not isinstance(trained, str) or not trained:
        report.not_looked("trained tokenizer", "the checkpoint does not tell which it was")
    elif trained == tokenizer.fingerprint:
        report.ok("trained tokenizer", f"{tokenizer.folder} is the one that the run was trained with")
    else:
        report.bad(
            "trained tokenizer",
            f"{tokenizer.folder} has another vocabulary or chat template (SHA-256 {tokenizer.fingerprint[:12]}…) than the run was trained "
            f"with ({trained[:12]}…): ids or turns mean something else to the model; put the right tokenizer files back",
        )
