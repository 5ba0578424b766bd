"""Every step's loss and gradient are looked at before anything they changed is kept."""

import math
from typing import Any

import torch
from torch import Tensor

from etude.data.batches import Batches
from etude.errors import VerificationError

MAX_OVERFLOWS = 30  # of fp16 in a row: the scale has been halved as often, so it is not the scale


class Health:
    """Checks a run's steps: at once, before they reach the weights, where that is free; on CUDA while the next step is under
    way, since waiting for the numbers would idle the GPU, and in any case before the weights are saved or used.
    """

    def __init__(self, batches: Batches, device: torch.device, scaled: bool):
        self._batches, self._device, self._scaled = batches, device, scaled
        self._overflows = 0  # fp16 steps skipped in a row
        self._unchecked: tuple[int, Tensor, Any] | None = None  # (step, its numbers on their way to the CPU, their arrival)

    def watch(self, step: int, loss_sum: Tensor, norm: Tensor, weight: Tensor) -> None:
        """Have the numbers of step ``step`` (from 0) checked, the ones of the step before at the latest now."""
        self.check()
        numbers = torch.stack((loss_sum.float(), norm.float(), weight))
        if self._device.type == "cuda":
            arriving = torch.empty(3, pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._unchecked = (step, arriving, event)
        else:
            self._require(step, *numbers.tolist())

    def check(self) -> None:
        """Raise :class:`VerificationError` if a step that was watched turns out to be bad."""
        if self._unchecked is not None:
            step, arriving, event = self._unchecked
            self._unchecked = None
            event.synchronize()
            self._require(step, *arriving.tolist())

    def count_overflow(self, step: int, overflow: bool) -> None:
        """Raise :class:`VerificationError` when fp16 overflows step after step, for then nothing is learnt at all."""
        self._overflows = self._overflows + 1 if overflow else 0
        if self._overflows > MAX_OVERFLOWS:
            raise VerificationError(
                f"step {step + 1}: fp16 has overflowed {self._overflows} times in a row; "
                "lower --learning_rate, or use --precision fp32"
            )

    def _require(self, step: int, loss_sum: float, norm: float, weight: float) -> None:
        """Raise :class:`VerificationError` on a bad number. A gradient of exactly 0 is one: a broken backward pass, which would
        otherwise pass for a run that does not learn. (fp16 gradients overflow and vanish now and then; the scaler sees to it.)
        """
        if math.isfinite(loss_sum) and weight > 0 and (self._scaled or (math.isfinite(norm) and norm > 0)):
            return
        what = "no supervised token" if weight == 0 else f"loss {loss_sum / weight:.4g}, gradient norm {norm:.4g}"
        raise VerificationError(
            f"step {step + 1}: {what}; no checkpoint holds it, so the run can go on from the last one. "
            f"Try a lower --learning_rate, or look at the step's samples: {self._batches.describe(step)}"
        )
