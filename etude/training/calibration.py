"""Steps of a run, measured before it is made: how long they take, and how much memory, for micro-batches of a few sizes.

The steps are the trainer's own, on batches of the run, at a learning rate of 0: the weights stay as they are, and afterwards the
trainer is as it was. Peak memory is a straight line over the rows of a micro-batch, what is there anyway and a share for each
row, so two sizes tell what any other takes, and which is the largest that fits.
"""

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.errors import UsageError
from etude.memory import Memory, kibibytes, trim
from etude.training.gradients import is_out_of_memory
from etude.training.health import Health
from etude.training.spikes import Spikes
from etude.training.trainer import Trainer

TRIED = 0.8  # of a CPU's memory, to measure in
BLIND_ROWS = 4  # measured at most where memory cannot be watched
MEASURED_SECONDS = {
    "cuda": 2.0,
    "mps": 4.0,
    "cpu": 6.0,
}  # of steps with the micro-batch that is asked for, after the first ones
OTHER_SECONDS = 1.0  # with others
WATCHED = {"cuda": 4, "mps": 4, "cpu": 20}  # steps at most in which the optimizer's part is told from the rest
STEP_SECONDS = 1.5  # a step of many micro-batches that takes longer is measured in part
SLOWEST_SECONDS = 12.0  # a step that takes longer than this is not measured but follows from smaller micro-batches


@dataclass(frozen=True)
class Measured:
    """Steps with micro-batches of ``rows`` rows: seconds, and bytes at the peak (None: not known)."""

    rows: int
    row_seconds: float  # forward and backward, of each row
    update_seconds: float  # clipping and optimizer, of each step
    first_seconds: float  # how much longer the first step took: compiling, mostly
    gradient_peak: int | None  # until the gradients are there
    update_peak: int | None  # after that
    steps: int


@dataclass(frozen=True)
class Line:
    """``fixed + each · rows``."""

    fixed: float
    each: float

    @classmethod
    def through(cls, points: list[tuple[float, float]]) -> "Line":
        """The line with the least squares; through the origin if there is one point only."""
        if len(points) == 1:
            return cls(0.0, points[0][1] / points[0][0])
        each, fixed = statistics.linear_regression(*zip(*points, strict=True))
        if each <= 0:  # noise; more rows never take less
            return cls(max(y for _, y in points), 0.0)
        return cls(fixed, each)

    def at(self, rows: float) -> float:
        return self.fixed + self.each * rows


# -- measuring ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _with(owner: object, **values: object) -> Iterator[None]:
    """Attributes that differ for a while."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)


@contextlib.contextmanager
def left_as_it_was(trainer: Trainer) -> Iterator[None]:
    """Let steps be taken that leave no trace in the trainer: their learning rate is 0, their counts are their own."""
    config = dataclasses.replace(trainer.config, learning_rate=0.0, auto_micro_batch=False)
    gradients, device = trainer.gradients, trainer.device
    generators = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cuda":
        generators.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    before = [get() for get, _ in generators]
    was_training = trainer.model.training
    own = {
        "config": config,
        "spikes": Spikes(config),
        "health": Health(trainer.batches, device, scaled=trainer.precision == "fp16"),
    }
    scaler = torch.amp.GradScaler(device.type) if gradients.scaler else None
    with _with(trainer, **own), _with(gradients, config=config, scaler=scaler, micro_batch_size=gradients.micro_batch_size):
        try:
            trainer.model.train()
            yield
            trainer.health.check()
        finally:
            _forget(trainer)
            trainer.model.train(was_training)
            for (_, put_back), state in zip(generators, before, strict=True):
                put_back(state)
            if trainer.compiled:
                torch.compiler.reset()


def _forget(trainer: Trainer) -> None:
    """Drop all that steps leave behind on the device: gradients and the optimizers' state."""
    trainer.gradients.forget()
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


@dataclass(frozen=True)
class Step:
    """What one step took, up to its gradients and after them: seconds, and bytes at the peak (None: not known)."""

    gradient_seconds: float
    update_seconds: float
    gradient_peak: int | None
    update_peak: int | None


class Calibration:
    """Measures steps with the micro-batch that is asked for, if it fits, and with another one."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.memory = trainer, Memory(trainer.device)
        self.rows = trainer.config.batch_size
        self.asked = trainer.gradients.micro_batch_size
        self.fewest = 1 if self.asked >= self.rows else 2  # micro-batches of a step: a second one finds gradients there already
        self.points: list[Measured] = []
        self.failed: int | None = None  # the fewest rows that ran out of memory
        self.static: int | None = None  # bytes that are there anyway, where that is known: weights, gradients, moments
        self.loads: list[float] = []  # seconds that reading each step's samples took
        self.gradient_bytes = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
        self.state_bytes = 2 * self.gradient_bytes  # the optimizers', as AdamW's are, until they have been seen

    def run(self) -> None:
        other = self.asked // 4 if self.asked >= 4 else self.asked * 4
        if self.trainer.device.type == "cuda":
            self._by_trying(other)
        else:
            self._with_care(other)

    def at(self, rows: int) -> Measured | None:
        return next((point for point in self.points if point.rows == rows), None)

    def _by_trying(self, other: int) -> None:
        """On a GPU running out of memory is an error like another."""
        size = self.asked
        while not self._runs(size) and size > 1:
            size //= 2
        if size < self.asked:
            other = size // 2
        while other > 0 and self.points and not self._runs(other):  # a larger one need not fit
            other = (size + other) // 2 if other > size + 1 else 0

    def _with_care(self, other: int) -> None:
        """A CPU has no such error: the machine stands still, or the process is killed. So one row first, and then only as many as
        are to be expected to leave room.
        """
        before = kibibytes("/proc/self/status").get("VmRSS", 0)
        shape = self.trainer.model.config
        # Roughly what autograd keeps of a row; it only tells whether one can be tried at all.
        kept = 140 * shape.hidden_size * shape.num_hidden_layers * self.trainer.batches.samples.block_size
        self.static = before + 3 * self.gradient_bytes  # with two moments
        if self.memory.limit is not None and self.static + kept > TRIED * self.memory.limit:
            return
        with _with(self.trainer.gradients, loss=self.trainer.loss):  # not compiled: that takes more memory, and no time
            first = self._steps(1, OTHER_SECONDS)
        if not self.trainer.compiled:
            self.points.append(first)
        for size in sorted((self.asked, other)):
            growth = self.growth() or self._steepest(first)
            fastest = min(point.row_seconds for point in (first, *self.points))
            most = min(size, max(1, int(SLOWEST_SECONDS / (self.fewest * fastest))))
            if growth is None or self.memory.limit is None:
                most = min(most, BLIND_ROWS)
            elif growth.each > 0:
                most = min(most, max(1, int((TRIED * self.memory.limit - growth.fixed) / growth.each)))
            if self.at(most) is None:
                self._runs(most)

    def _runs(self, rows: int) -> bool:
        """Measure steps with micro-batches of ``rows``. False if they run out of memory."""
        _forget(self.trainer)
        if self.trainer.compiled:
            torch.compiler.reset()  # it takes a few sizes only, and then compiles no more
        try:
            seconds = MEASURED_SECONDS[self.trainer.device.type] if rows == self.asked else OTHER_SECONDS
            self.points.append(self._steps(rows, seconds))
            return True
        except (RuntimeError, UsageError) as error:
            if not any(isinstance(found, Exception) and is_out_of_memory(found) for found in (error, error.__cause__)):
                raise
        gc.collect()  # out here, where no traceback holds the activations any more
        _forget(self.trainer)
        self.failed = rows
        return False

    def _steps(self, rows: int, seconds: float) -> Measured:
        """Take steps for about so many seconds, and two before that."""
        self.trainer.gradients.micro_batch_size = rows
        total = self.rows if rows == self.asked else self.fewest * rows
        used = min(total, self.fewest * rows)
        first, warm = self._step(used), [self._step(used)]
        while not all(optimizer.state for optimizer in self.trainer.optimizers) and len(warm) < 20:
            warm.append(self._step(used))  # fp16 skips steps until it has found its scale
        states = [state for optimizer in self.trainer.optimizers for state in optimizer.state.values()]
        self.state_bytes = sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
        row_seconds, took = warm[-1].gradient_seconds / used, warm[-1].gradient_seconds + warm[-1].update_seconds
        compiling = max(0.0, first.gradient_seconds + first.update_seconds - took)
        if used < total:  # the whole of a short step, and of a longer one some more of its micro-batches
            used = min(total, rows * max(self.fewest, int(STEP_SECONDS / (row_seconds * rows))))
            took = row_seconds * used + warm[-1].update_seconds
        count = max(2, int(seconds / took)) if took < seconds else 0
        on_cpu = self.trainer.device.type == "cpu"  # there watching takes memory away that the next step is to find again
        steps = [self._step(used, not on_cpu) for _ in range(min(WATCHED[self.trainer.device.type], count))] or warm[-1:]
        update = statistics.median(step.update_seconds for step in steps)
        gradient = statistics.median(step.gradient_seconds for step in steps)
        if self.trainer.device.type == "cuda":  # a run does not wait for the device within a step
            gradient = self._unwatched(used, min(50, max(3, count))) - update
        whole = [first, *warm, *([] if on_cpu else steps)]
        return Measured(
            rows=rows,
            row_seconds=max(gradient, 1e-9) / used,
            update_seconds=update,
            first_seconds=compiling,
            gradient_peak=_largest(step.gradient_peak for step in whole),
            update_peak=_largest(step.update_peak for step in whole),
            steps=len([first, *warm, *steps]),
        )

    def _batch(self, rows: int) -> dict[str, Tensor]:
        """The first rows of the run's next step, over and over if it has fewer. Batches differ in what is learnt."""
        started = time.perf_counter()
        batch = self.trainer.batches.at(len(self.loads) % self.trainer.steps)
        self.loads.append(time.perf_counter() - started)
        times = -(-rows // len(next(iter(batch.values()))))
        if times > 1:
            batch = {name: torch.cat([tensor] * times) for name, tensor in batch.items()}
        return {name: tensor[:rows] for name, tensor in batch.items()}

    def _step(self, rows: int, memory: bool = True) -> Step:
        """One step of so many rows, watched when its gradients are there. Without ``memory`` only its times are of use."""
        compute, reached = self.trainer.gradients.compute, []

        def watched(*arguments, **keywords):
            result = compute(*arguments, **keywords)
            self._wait()
            between, peak = time.perf_counter(), self.memory.peak()
            if memory:
                self.memory.reset()
            reached.append((between, peak, time.perf_counter()))
            return result

        batch = self._batch(rows)
        self._wait()
        if memory:
            self.memory.reset()
        started = time.perf_counter()
        with _with(self.trainer.gradients, compute=watched):
            self.trainer.optimizer_step(batch)
        self._wait()
        ended = time.perf_counter()
        ((between, peak, resumed),) = reached
        return Step(between - started, ended - resumed, peak, self.memory.peak())

    def _unwatched(self, rows: int, count: int) -> float:
        """Seconds of a step of so many rows, as a run takes them: one after the other."""
        batches = [self._batch(rows) for _ in range(3)]
        self._wait()
        started = time.perf_counter()
        for number in range(count):
            self.trainer.optimizer_step(batches[number % len(batches)])
        self._wait()
        return (time.perf_counter() - started) / count

    def _wait(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)
        elif self.trainer.device.type == "mps":
            torch.mps.synchronize()

    # -- what follows --------------------------------------------------------------------------------------------------------

    def growth(self) -> Line | None:
        """Peak memory over the rows of a micro-batch."""
        known = [point for point in self.points if point.gradient_peak is not None]
        if len(known) == 1:
            return self._steepest(known[0])
        return Line.through([(point.rows, point.gradient_peak) for point in known]) if known else None

    def _steepest(self, point: Measured) -> Line | None:
        """What can be said from one size: all that is not there anyway is put down to the rows."""
        if self.static is None or point.gradient_peak is None:
            return None
        return Line(self.static, max(0, point.gradient_peak - self.static) / point.rows)

    def peak(self, rows: int) -> float | None:
        """Bytes at the peak of a step with micro-batches of ``rows``."""
        point, growth = self.at(rows), self.growth()
        if point is not None and point.gradient_peak is not None:
            return max(point.gradient_peak, point.update_peak or 0)
        return None if growth is None else max(growth.at(rows) + self._more(rows), self._update_peak())

    def _update_peak(self) -> int:
        return max(point.update_peak or 0 for point in self.points)

    def _more(self, rows: int) -> int:
        """What steps of several micro-batches need beside those of one that were measured."""
        return self.gradient_bytes if self.fewest == 1 and rows < self.rows else 0

    def largest(self, room: float) -> int | None:
        """The most rows of a micro-batch whose step takes no more than ``room`` bytes; 0 if there is none."""
        growth = self.growth()
        if growth is None:
            return max(point.rows for point in self.points) if self.failed is not None and self.points else None
        most = self._most(growth, room)
        if most < self.rows:
            most = self._most(growth, room - self._more(most))
        if self._update_peak() > room:
            return 0
        return most if self.failed is None else min(most, self.failed - 1)

    def _most(self, growth: Line, room: float) -> int:
        if growth.each > 0:
            return max(0, int((room - growth.fixed) / growth.each))
        return max(point.rows for point in self.points) if growth.fixed <= room else 0

    def row_seconds(self, rows: int) -> float:
        """Forward and backward of each row, in micro-batches of ``rows``."""
        if point := self.at(rows):
            return point.row_seconds
        return Line.through([(point.rows, point.rows * point.row_seconds) for point in self.points]).at(rows) / rows

    def step_seconds(self, rows: int) -> float:
        """Of a whole step, with micro-batches of ``rows``."""
        return self.row_seconds(rows) * self.rows + max(self.points, key=lambda point: point.rows).update_seconds


def _largest(values: Iterable[int | None]) -> int | None:
    values = list(values)
    return None if None in values else max(values)
