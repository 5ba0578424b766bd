"""Which samples a step sees: a pure function of (seed, step).

A global batch is a fixed list of sample numbers; processes and micro-batches only slice it. So the loader's whole state
is the step, resuming costs nothing, and any number of processes sees the same samples in the same steps.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from etude.errors import DataError
from etude.losses import IGNORED
from etude.parallel import Processes


class Samples(Protocol):
    """What batches are made of: :class:`~etude.data.pretrain.PretrainBlocks`, :class:`~etude.data.sft.SFTRows`, …"""

    block_size: int

    def __len__(self) -> int: ...

    def load(self, numbers: Sequence[int]) -> dict[str, np.ndarray]: ...

    def documents(self, number: int) -> list[int]: ...

    def describe(self, number: int) -> str: ...


def shuffled(index: int, count: int, seed: int, epoch: int) -> int:
    """Where ``index`` comes to stand when 0 … ``count`` - 1 are shuffled, without making the list.

    A four-round Feistel network over the smallest even number of bits that holds ``count``, walked until it lands inside
    (cycle walking; J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It takes at most a few rounds
    on average since the network's domain is less than four times ``count``.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round in range(4):
            digest = hashlib.blake2b(f"{seed},{epoch},{round},{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & low)
        index = left << half | right
        if index < count:
            return index


class Batches:
    """The global batches of a run: ``batch_size`` samples a step, every sample once an epoch, each epoch reshuffled."""

    def __init__(self, samples: Samples, batch_size: int, seed: int):
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.processes = Processes()
        self.left_out: dict[int, int] = {}  # document → the step from which on it teaches nothing
        self.pinned = False  # whether to put batches where a CUDA device fetches them from without stopping the CPU

    @property
    def steps_per_epoch(self) -> float:
        return len(self.samples) / self.batch_size

    def numbers(self, step: int) -> list[int]:
        """The sample numbers of step ``step`` (from 0). An epoch's end may fall inside a batch; nothing is dropped."""
        first, count = step * self.batch_size, len(self.samples)
        places = (divmod(place, count) for place in range(first, first + self.batch_size))
        return [shuffled(index, count, self.seed, epoch) for epoch, index in places]

    def documents(self, step: int) -> list[int]:
        """The documents that a step's samples are made of."""
        return sorted({document for number in self.numbers(step) for document in self.samples.documents(number)})

    def describe(self, step: int) -> str:
        """Where the samples of a step come from, for people."""
        return ", ".join(self.samples.describe(number) for number in self.numbers(step))

    def at(self, step: int) -> dict[str, Tensor]:
        """This process's rows of a step's global batch, on the CPU; slice them with :func:`micro_batches`.

        Raises :class:`DataError` naming the step's samples where they cannot be read.
        """
        try:
            numbers = self.numbers(step)[self.processes.rows(self.batch_size)]
            arrays = self.samples.load(numbers)
            for row, number in enumerate(numbers if self.left_out else []):
                if any(self.left_out.get(document, step) < step for document in self.samples.documents(number)):
                    arrays["labels"][row] = IGNORED  # the whole row: what it holds beside them is not told apart
        except Exception as error:  # a damaged store, a vanished disk: whatever it is, say which samples it was
            try:
                samples = self.describe(step)
            except Exception:  # out of the same store
                samples = f"numbers {', '.join(map(str, self.numbers(step)))}"
            raise DataError(
                f"step {step + 1}: its samples cannot be read ({type(error).__name__}: {error}): {samples}"
            ) from error
        batch = as_tensors(arrays)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pinned else batch


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def micro_batches(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Cut a batch into pieces of ``size`` rows; the last may be smaller."""
    rows = len(next(iter(batch.values())))
    return [{name: tensor[at : at + size] for name, tensor in batch.items()} for at in range(0, rows, size)]


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy a batch to the device, to CUDA without waiting for what is pinned."""
    return {name: tensor.to(device, non_blocking=tensor.is_pinned()) for name, tensor in batch.items()}
