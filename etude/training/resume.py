"""Where a run goes on from: what it writes down of itself beside its weights, and how all of that is put back."""

import math
from typing import TYPE_CHECKING, Any

from etude import paths
from etude.errors import MismatchError
from etude.training import checkpoint
from etude.training.identity import changes_since, free_settings

if TYPE_CHECKING:
    from etude.training.trainer import Trainer


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """What a checkpoint has to know of a run, as plain JSON values."""
    scaler = trainer.gradients.scaler
    return {
        "step": trainer.step,
        "steps": trainer.steps,
        "best_val_loss": trainer.best_val_loss if math.isfinite(trainer.best_val_loss) else None,
        "validation_pending": trainer.validation_pending,
        "tokens_seen": trainer.tokens_seen,
        "seconds": trainer.seconds,
        "scaler": scaler.state_dict() if scaler else None,
        "spikes": trainer.spikes.state(),
        "identity": trainer.identity,
        "settings": free_settings(trainer.config),
    }


def take(trainer: "Trainer", found: checkpoint.Checkpoint) -> None:
    """Put the whole run where a checkpoint left it."""
    checkpoint.restore(found, trainer.model, trainer.optimizers)
    if trainer.gradients.scaler and found.state["scaler"]:
        trainer.gradients.scaler.load_state_dict(found.state["scaler"])
    trainer.step = found.step
    best = found.state["best_val_loss"]
    trainer.best_val_loss = math.inf if best is None else best
    trainer.validation_pending = found.state["validation_pending"]
    trainer.tokens_seen, trainer.seconds = found.state["tokens_seen"], found.state["seconds"]
    trainer.spikes.restore(found.state["spikes"])
    trainer.leave_out(trainer.spikes.quarantine)


def newest(trainer: "Trainer") -> checkpoint.Checkpoint | None:
    """The run's newest good checkpoint, the same one in every process: the first decides."""
    found: checkpoint.Checkpoint | None = None

    def decide() -> str:
        nonlocal found
        found = checkpoint.newest_good(trainer.config.output)
        return str(found.path) if found else ""

    path = trainer.processes.from_first(decide)
    return found if trainer.processes.is_first or not path else checkpoint.load(path)


def go_on(trainer: "Trainer") -> str:
    """Go on from the checkpoint that the settings ask for, if there is one. Returns a line about it for the header.

    Raises :class:`MismatchError` for one of a different run, or past this one's end.
    """
    output, wanted = trainer.config.output, trainer.config.resume
    if wanted == "never":
        aside = checkpoint.set_aside(output) if trainer.processes.is_first else None
        return f"earlier checkpoints were moved to {paths.typed(aside)}" if aside else ""
    found = newest(trainer) if wanted == "auto" else checkpoint.load(wanted)
    if found is None:
        return ""
    notes = changes_since(found, trainer.config, trainer.identity)
    if trainer.steps < found.step:
        raise MismatchError(
            f"{found.path}: the run is at step {found.step} already, past the {trainer.steps} asked for; "
            "ask for more, or start over with --resume never"
        )
    take(trainer, found)
    if found.state["steps"] != trainer.steps:
        notes.append(
            f"steps {found.state['steps']} → {trainer.steps}, and the learning rate's schedule with them: not the old run any more"
        )
    trainer.processes.meet()  # all have read before anything is moved
    if trainer.processes.is_first and (aside := checkpoint.set_aside(output, after=trainer.step)):
        notes.append(f"later checkpoints were moved to {paths.typed(aside)}")
    return "; ".join([f"from {paths.typed(found.path)}", *notes])
