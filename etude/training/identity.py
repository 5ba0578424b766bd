"""What a run is: the settings and fingerprints that a checkpoint must share with a run before the run goes on from it."""

from typing import Any

from etude import cli
from etude.errors import MismatchError
from etude.training.checkpoint import Checkpoint
from etude.training.config import FREE_ON_RESUME, TOLD_BY_CONTENT, TrainingConfig


def identity(config: TrainingConfig, shape: dict[str, Any], precision: str, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """All that decides a run's numbers. ``shape`` is the model's config, ``precision`` the one that was picked."""
    settings = {name: value for name, value in cli.as_dict(config).items() if name not in FREE_ON_RESUME}
    of_model = {f"model.{name}": value for name, value in shape.items()}
    # The shape as it came out, not as it was asked for: a preset and its numbers spelled out are one model.
    settings = {name: value for name, value in settings.items() if f"model.{name}" not in of_model and name != "preset"}
    return {**settings, "precision": precision, **of_model, **fingerprints}


def free_settings(config: TrainingConfig) -> dict[str, Any]:
    """What may differ on resume, and is then printed; ``max_steps`` and ``epochs`` show as the number of steps."""
    shown = FREE_ON_RESUME - TOLD_BY_CONTENT - {"resume", "allow_mismatch", "max_steps", "epochs"}
    return {name: value for name, value in cli.as_dict(config).items() if name in shown}


def changes_since(found: Checkpoint, config: TrainingConfig, own: dict[str, Any]) -> list[str]:
    """What differs from the checkpoint, old → new, for people to read.

    Raises :class:`MismatchError` where a difference would make another run of it, unless ``allow_mismatch`` names it.
    """
    allowed = {name.strip() for name in config.allow_mismatch.split(",") if name.strip()}
    old = found.state["identity"]
    differing = [name for name in sorted(old.keys() | own.keys()) if old.get(name) != own.get(name)]
    changes = {name: f"{name} {old.get(name)} → {own.get(name)}" for name in differing}
    refused = [name for name in differing if name not in allowed]
    if refused:
        raise MismatchError(
            f"{found.path} is of a different run: {'; '.join(changes[name] for name in refused)}. Put the old settings back, "
            f"choose another --output, start over with --resume never, or accept it with --allow_mismatch {','.join(refused)}"
        )
    before, now = found.state["settings"], free_settings(config)
    free = [f"{name} {before[name]} → {now[name]}" for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    return [f"allowed: {changes[name]}" for name in differing] + free
