"""What a run is going to take on this machine, told before it is made: memory, time, disk and money.

Nothing is written. The numbers follow from a few measured steps (see :mod:`etude.training.calibration`).
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from etude.device import peak_flops
from etude.errors import UsageError
from etude.evaluation import evaluate_loss
from etude.runlog import duration
from etude.training import report
from etude.training.calibration import Calibration, Measured, left_as_it_was
from etude.training.trainer import Trainer

FITS = 0.95  # of the memory that can be had: the rest is for fragments, and for batches unlike those that were measured
DISK_BYTES_PER_SECOND = 250e6  # assumed, SHA-256 included, since nothing is written to find out


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it. Sizes are in bytes, times in seconds; None: not known."""

    parameters: int
    matmul_parameters: int
    steps: int
    tokens_per_step: int
    epochs: float
    flops: float  # of training, validation left out
    asked: int  # rows of a micro-batch, as set or by default
    asked_peak: float | None
    fits: bool | None  # whether so many rows do
    largest: int | None  # rows of a micro-batch that fit; 0: not even one
    taken: int  # rows of a micro-batch that the rest is about: those asked for, or the most that fit
    peak: float | None
    limit: int | None  # of memory, for this process
    step_seconds: float | None
    load_seconds: float | None  # to read a step's samples, which goes on beside the step before
    mfu: float | None  # model FLOPs utilisation, where the device's peak is known
    seconds: dict[str, float]  # of the whole run, by what takes them
    checkpoint_bytes: int
    disk: int  # when the run is done
    disk_peak: int  # while a checkpoint or a model is being replaced
    disk_free: int
    measured: tuple[Measured, ...]

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def wall_seconds(self) -> float:
        return sum(self.seconds.values())


def print_plan(trainer: Trainer) -> None:
    """Print what ``trainer.run()`` is going to take. Raises :class:`UsageError` where several processes are to train."""
    _require_one_process(trainer)
    print(report.header(trainer))
    compiling = ", besides compiling twice" if trainer.compiled else ""
    print(f"plan      measuring steps: about a minute{compiling}; nothing is trained or written", flush=True)
    for line in told(make_plan(trainer), trainer):
        print(line)


def make_plan(trainer: Trainer) -> Plan:
    """Measure, and foretell the run from its first step on. The trainer is left as it was."""
    _require_one_process(trainer)
    calibration = Calibration(trainer)
    with left_as_it_was(trainer):
        calibration.run()
        return _foretold(trainer, calibration)


def _require_one_process(trainer: Trainer) -> None:
    if trainer.processes.count > 1:
        raise UsageError(
            f"--plan measures one process by itself, and torchrun started {trainer.processes.count}; run it without torchrun"
        )


# -- foretelling --------------------------------------------------------------------------------------------------------------


def _foretold(trainer: Trainer, calibration: Calibration) -> Plan:
    config, memory, asked, ran = trainer.config, calibration.memory, calibration.asked, bool(calibration.points)
    weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
    checkpoint_bytes = calibration.gradient_bytes + calibration.state_bytes  # of weights, those that are trained
    # On a CPU the copy that a checkpoint is written from may be there beside the next step.
    beside = checkpoint_bytes if trainer.device.type == "cpu" else 0

    asked_peak = calibration.peak(asked)
    largest = None if memory.limit is None else calibration.largest(FITS * memory.limit - beside) if ran else 0
    if not ran or (calibration.failed or math.inf) <= asked:
        fits = False
    elif asked_peak is None or memory.limit is None:
        fits = None
    else:
        fits = asked_peak + beside <= FITS * memory.limit or (trainer.device.type == "cuda" and bool(calibration.at(asked)))
    if largest is not None and fits is not None:
        largest = max(largest, asked) if fits else min(largest, asked - 1)
    taken = largest if fits is False else asked

    seconds, step_seconds, load_seconds, mfu, peak = {}, None, None, None, None
    tokens_per_step, flops_per_token = trainer.tokens_per_step, _flops_per_token(trainer)
    if taken:
        validation = _validation_seconds(trainer)  # of fewer rows, and without gradients: less memory, too
        if (peak := calibration.peak(taken)) is not None and beside:
            peak += _met(trainer, calibration, taken, beside)
        load_seconds = statistics.median(calibration.loads)
        step_seconds = max(calibration.step_seconds(taken), load_seconds)
        compiling = max(calibration.points, key=lambda point: point.rows).first_seconds if trainer.compiled else 0.0
        seconds = _seconds(trainer, step_seconds, validation, compiling, checkpoint_bytes, weights)
        if device_flops := peak_flops(trainer.device):
            mfu = flops_per_token * tokens_per_step / step_seconds / device_flops

    counts = trainer.model.config.num_parameters()
    models = weights * (1 if trainer.val is None else 2)  # the last and the best
    return Plan(
        parameters=counts["total"],
        matmul_parameters=counts["matmul"],
        steps=trainer.steps,
        tokens_per_step=tokens_per_step,
        epochs=trainer.steps / trainer.batches.steps_per_epoch,
        flops=flops_per_token * tokens_per_step * trainer.steps,
        asked=asked,
        asked_peak=None if asked_peak is None else asked_peak + beside,
        fits=fits,
        largest=largest,
        taken=taken,
        peak=peak,
        limit=memory.limit,
        step_seconds=step_seconds,
        load_seconds=load_seconds,
        mfu=mfu,
        seconds=seconds,
        checkpoint_bytes=checkpoint_bytes,
        disk=min(config.keep_checkpoints, _times(trainer.steps, trainer.intervals()["save"])) * checkpoint_bytes + models,
        disk_peak=(config.keep_checkpoints + 1) * checkpoint_bytes + models + weights,
        disk_free=shutil.disk_usage(_existing(config.output)).free,
        measured=tuple(calibration.points),
    )


def _met(trainer: Trainer, calibration: Calibration, rows: int, copy: int) -> float:
    """How much of a checkpoint's copy adds to the next step's peak. It goes when it is written, and the peak comes with the end of a
    forward pass, a third of a micro-batch's time; half of it where it cannot be told which comes first.
    """
    writing, micro_batch = copy / DISK_BYTES_PER_SECOND, calibration.row_seconds(rows) * rows
    if rows < trainer.config.batch_size and writing < micro_batch * 4 / 3:
        copy = max(0, copy - calibration.gradient_bytes)  # which only later micro-batches find in memory
    forward = micro_batch / 3
    return 0.0 if writing < forward / 2 else copy / 2 if writing < forward * 2 else float(copy)


def _flops_per_token(trainer: Trainer) -> int:
    return trainer.model.config.training_flops_per_token(trainer.batches.samples.block_size)


def _seconds(
    trainer: Trainer, step: float, validation: float, compiling: float, checkpoint_bytes: int, weights: int
) -> dict[str, float]:
    """What a run's time goes to."""
    every = trainer.intervals()
    validations, samples, saves = (_times(trainer.steps, every[name]) for name in ("eval", "sample", "save"))
    seconds = {_counted(trainer.steps, "step"): trainer.steps * step}
    models = 1  # that are saved
    if trainer.val is not None:
        seconds[_counted(validations, "validation")] = validations * validation
        models += validations  # each is the best so far, if all goes well
    if trainer.sample and every["sample"]:
        seconds[_counted(samples, "sample")] = samples * _timed(lambda: trainer.sample(trainer.model))
    # A step waits for a checkpoint's copy, and for the checkpoint before it if that is still being written.
    parameters = list(trainer.model.parameters())
    copying = _timed(lambda: [parameter.detach().to("cpu", copy=True) for parameter in parameters]) * checkpoint_bytes / weights
    writing = checkpoint_bytes / DISK_BYTES_PER_SECOND
    waiting = copying + max(0.0, writing - every["save"] * step)
    seconds[_counted(saves, "checkpoint")] = saves * waiting + writing + models * weights / DISK_BYTES_PER_SECOND
    if compiling:
        seconds["compiling"] = compiling
    return seconds


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _times(steps: int, every: int) -> int:
    """How often something is due that comes every so many steps, and at the last one."""
    return -(-steps // every) if every else 1


def _validation_seconds(trainer: Trainer) -> float:
    """Of one validation, by a few of its batches."""
    if trainer.val is None:
        return 0.0
    block_size, rows, count = trainer.val.block_size, trainer.eval_batch_size, len(trainer.val)
    if trainer.config.max_eval_tokens:
        count = min(count, max(1, trainer.config.max_eval_tokens // block_size))

    def evaluate(samples: int) -> float:
        arguments = (trainer.model, trainer.val, trainer.device, trainer.precision, trainer.loss, rows, samples * block_size)
        return _timed(lambda: evaluate_loss(*arguments))

    few = min(count, 2 * rows)
    evaluate(min(count, rows))  # the first is slower
    return evaluate(few) * count / few


def _existing(path: str) -> Path:
    """The folder itself, or the nearest above that exists."""
    folder = Path(path).absolute()
    return next(found for found in (folder, *folder.parents) if found.is_dir())


# -- telling ------------------------------------------------------------------------------------------------------------------


def told(plan: Plan, trainer: Trainer) -> list[str]:
    """A plan for people, in lines like those of a run's header."""
    size = f"{plan.parameters:,} parameters, {plan.matmul_parameters:,} in matrix products; {plan.tokens:,} tokens"
    lines = [f"size      {size}; {plan.flops:.3g} FLOPs", f"memory    {_memory_told(plan, trainer)}"]
    if plan.step_seconds:
        rate = plan.tokens_per_step / plan.step_seconds
        with_rows = "" if plan.taken == plan.asked else f" with --micro_batch_size {plan.taken}"
        mfu = "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
        loading = "; it waits for its samples to be read" if plan.load_seconds >= plan.step_seconds else ""
        lines.append(f"step      {_precise(plan.step_seconds)}{with_rows}: {rate:,.0f} tokens/s{mfu}{loading}")
        parts = ", ".join(f"{what} {duration(seconds)}" for what, seconds in plan.seconds.items())
        lines.append(f"time      {duration(plan.wall_seconds)} from the first step on: {parts}")
    short = "" if plan.disk_peak <= plan.disk_free else ": NOT ENOUGH; free some, or lower --keep_checkpoints"
    lines.append(
        f"disk      {_size(plan.disk)}, a checkpoint being {_size(plan.checkpoint_bytes)}; {_size(plan.disk_peak)} while one is "
        f"replaced, and {_size(plan.disk_free)} are free{short}"
    )
    price = trainer.config.hourly_price
    if price and plan.step_seconds:
        hours = plan.wall_seconds / 3600
        lines.append(f"cost      {hours * price:,.2f} ({hours:,.2f} hours at {price:g})")
    return lines


def _memory_told(plan: Plan, trainer: Trainer) -> str:
    if plan.fits is None:
        return "not known: it can be watched on CUDA devices, and for a CPU on Linux and macOS"
    had, on_cpu = f"{_size(plan.limit)} that can be had", trainer.device.type == "cpu"
    if not plan.taken:
        shorter = f"a shorter --block_size than {trainer.config.block_size}"
        return f"not even one row fits into the {had}: choose {shorter}, or a smaller model"
    peak = f"{_size(plan.peak)} at the peak{' of the whole process' if on_cpu else ''}"
    beside = " beside a checkpoint's copy" if on_cpu else ""
    if plan.fits:
        larger = " (of use with a larger --batch_size)" if plan.largest > trainer.config.batch_size else ""
        most = f"--micro_batch_size {plan.largest} fits{beside}{larger}"
        return f"{peak} with --micro_batch_size {plan.asked}; of {had}, up to {most}"
    wanted = "ran out of memory" if plan.asked_peak is None else f"would take {_size(plan.asked_peak)}"
    return (
        f"--micro_batch_size {plan.asked} does not fit: it {wanted}, of {had}; --micro_batch_size {plan.taken} does{beside}, "
        f"with {peak}, and gives the same gradient"
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _precise(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
