"""Steps that go wrong on the way: told from the others, and by option skipped, or gone back from."""

import math
import statistics
from collections import deque
from typing import Any

from etude.errors import VerificationError
from etude.training.config import TrainingConfig

WINDOW = 64  # steps that a step is compared with
LEAST = 16  # of them there must be before one is judged: the first ones fall too fast to compare with


class SpikeFound(Exception):
    """A step's loss or gradient is out of line; nothing has been updated."""


class Spikes:
    """What a run knows of its spikes. All of it is part of a checkpoint, so that a resumed run judges and counts alike.

    A quarantined step makes no update, but keeps its number and its learning rate; later steps leave out its documents.
    So a run that went back equals one that had known from the start.
    """

    def __init__(self, config: TrainingConfig):
        self.factor, self.skips_allowed, self.rewinds_allowed = config.spike_factor, config.skip_spikes, config.rewind_on_spike
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped: list[int] = []  # steps (from 0) whose update was skipped
        self.quarantine: list[dict[str, Any]] = []  # {"step": from 0, "documents": [ids]}, in the order they were found

    @property
    def active(self) -> bool:
        return bool(self.skips_allowed or self.rewinds_allowed)

    def require_none(self, loss: float, norm: float) -> None:
        """Remember a step's numbers. Raises :class:`SpikeFound` instead where they are out of line."""
        for name, value, before in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if not math.isfinite(value):
                raise SpikeFound(f"the {name} is {value}")
            if len(before) >= LEAST and value > self.factor * (usual := statistics.median(before)):
                raise SpikeFound(f"{name} {value:.4g}, {value / usual:.1f} times the median {usual:.4g} of {len(before)} steps")
        self.losses.append(loss)
        self.norms.append(norm)

    def is_quarantined(self, step: int) -> bool:
        return any(entry["step"] == step for entry in self.quarantine)

    def skip(self, step: int, told: str) -> None:
        """Count a skipped step. Raises :class:`VerificationError` above the number that is allowed."""
        self.skipped.append(step)
        if len(self.skipped) > self.skips_allowed:
            raise VerificationError(
                f"{told}; {self.skips_allowed} spikes were skipped already (--skip_spikes); lower --learning_rate, or look at the data"
            )

    def put_in_quarantine(self, step: int, documents: list[int], told: str) -> None:
        """Note a step to go back from. Raises :class:`VerificationError` above the number that is allowed."""
        if len(self.quarantine) >= self.rewinds_allowed:
            raise VerificationError(
                f"{told}; the run went back {self.rewinds_allowed} times already (--rewind_on_spike); lower --learning_rate, "
                "or look at the data"
            )
        self.quarantine.append({"step": step, "documents": documents})

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": list(self.skipped),
            "quarantine": list(self.quarantine),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.losses, self.norms = deque(state["losses"], WINDOW), deque(state["norms"], WINDOW)
        self.skipped, self.quarantine = list(state["skipped"]), list(state["quarantine"])
