"""A loss curve, as metrics.jsonl tells it, against what a sound run looks like.

Thresholds are wide, since small runs are noisy: a batch of two rows moves the loss by half a nat from step to step. What they are
to tell apart is larger: a leak, a lost state, a loss that does not move at all.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from etude.doctor.report import Report, some_of
from etude.runlog import damaged_lines, read_metrics

JUDGED_STEPS = 50  # shorter runs are rehearsals: their loss may well have stood still
WINDOW = 8  # records that a record is compared with
LEAST = 4  # of them there must be


class Point(NamedTuple):
    step: int
    value: float


class Origin(NamedTuple):
    """What is known of a run's beginning."""

    vocab_size: int | None
    from_scratch: bool  # new weights, so the first loss is a guess's
    logit_std: float = 0.0  # of new weights: initializer_range · √hidden_size, as the normed hidden state has length √D


def last_loss(path: Path) -> float | None:
    """Where the training loss ended, without the last batches' noise."""
    last = [point.value for point in points(read_metrics(path), "loss")[-WINDOW:] if math.isfinite(point.value)]
    return statistics.median(last) if last else None


def look_at_curve(path: Path, origin: Origin, report: Report) -> None:
    read = read_metrics(path)
    if damaged := damaged_lines(path):
        report.bad("metrics.jsonl", f"{path}:{damaged[0]}: not a record of a step ({len(damaged):,} such lines, left out here)")
    records = _usable(read)
    train, val, norms = (points(records, name) for name in ("loss", "val_loss", "grad_norm"))
    if not train:
        report.not_looked("loss curve", "metrics.jsonl holds no training loss yet")
        return
    before = len(report.findings)
    _look_at_numbers(train, val, norms, report)
    train, val = ([point for point in curve if math.isfinite(point.value)] for curve in (train, val))
    _look_at_order(records, report)
    if train:
        _look_at_beginning(train, origin, report)
        _look_at_progress(train, origin, report)
        _look_for_jumps(train, report)
        _look_for_overfitting(train, val, report)
        if len(report.findings) == before:
            report.ok(
                "loss curve", f"{train[0].value:.3f} → {train[-1].value:.3f} in {train[-1].step} steps, nothing out of line"
            )


def _usable(records: Sequence[Any]) -> list[dict[str, Any]]:
    return [record for record in records if isinstance(record, dict) and type(record.get("step")) is int]


def points(records: Sequence[Any], name: str) -> list[Point]:
    return [
        Point(record["step"], float(record[name])) for record in _usable(records) if isinstance(record.get(name), int | float)
    ]


def _steps(found: Sequence[Point]) -> str:
    return some_of([f"step {point.step}" for point in found])


def _look_at_numbers(train: list[Point], val: list[Point], norms: list[Point], report: Report) -> None:
    for name, curve in (("loss", train), ("val_loss", val), ("grad_norm", norms)):
        if broken := [point for point in curve if not math.isfinite(point.value)]:
            report.bad(
                "loss curve", f"{name} is not finite ({_steps(broken)}); go back to a checkpoint before, lower --learning_rate"
            )
        if zero := [point for point in curve if point.value == 0]:
            meaning = (
                "no gradient arrives, so nothing is learnt" if name == "grad_norm" else "no token was learnt, or all was known"
            )
            report.bad("loss curve", f"{name} is exactly 0 ({_steps(zero)}): {meaning}; look at the labels and the loss mask")


def _look_at_order(records: Sequence[dict[str, Any]], report: Report) -> None:
    """Steps and tokens only ever grow, by the same tokens a step: else a resume replayed or left out data."""
    training = [record for record in records if "loss" in record]
    steps = [record["step"] for record in training]
    if back := [later for earlier, later in pairwise(steps) if later <= earlier]:
        report.bad(
            "loss curve", f"steps do not grow (again at step {back[0]}): two runs wrote one file, or a resume went wrong"
        )
        return
    rates = [
        (record["step"], record["tokens"] / record["step"]) for record in training if record.get("tokens") and record["step"]
    ]
    changed = [step for step, rate in rates if not math.isclose(rate, rates[0][1], rel_tol=1e-6)]
    if changed:
        report.warn(
            "loss curve", f"tokens a step change at step {changed[0]}: batch_size or block_size did, or a resume left out data"
        )


def _look_at_beginning(train: list[Point], origin: Origin, report: Report) -> None:
    """New weights guess: the first loss is ln V, and σ²/2 more for logits of standard deviation σ. It cannot be below before
    anything was learnt; a record of a later step says less.
    """
    if not origin.vocab_size:
        return
    chance, first = math.log(origin.vocab_size), train[0]
    if origin.from_scratch:
        expected = chance + origin.logit_std**2 / 2
        if first.value > expected + 1:
            report.bad(
                "first loss",
                f"{first.value:.2f} at step {first.step}, but guessing costs ln({origin.vocab_size}) = {chance:.2f}: the initial weights "
                "are too large, or the loss is divided by the wrong number of tokens",
            )
        elif first.step <= 2 and first.value < 0.8 * chance:
            report.bad(
                "first loss",
                f"{first.value:.2f} at step {first.step}, before anything can be learnt; guessing costs ln({origin.vocab_size}) = {chance:.2f}: "
                "labels leak into the input, or the loss is divided by too many tokens (padding, masked ones)",
            )
        # A text's entropy is a fifth of ln V at the least; only copying gets below a tenth within the first fifth of a run.
        early = [point for point in train if point.step <= min(200, train[-1].step / 5) and point.value < 0.1 * chance]
        if early:
            report.bad(
                "loss curve",
                f"only {early[0].value:.3f} at step {early[0].step} already: the model sees what it is to predict; check the causal "
                "mask, that labels are one token ahead, and that the data is not one text over and over",
            )


def _look_at_progress(train: list[Point], origin: Origin, report: Report) -> None:
    quarter = max(1, len(train) // 4)
    first = statistics.median(point.value for point in train[:quarter])
    last = statistics.median(point.value for point in train[-quarter:])
    highest = max(train[0].value, first)
    if len(train) >= LEAST and last > highest + 1:
        report.bad(
            "loss curve", f"rises from {highest:.2f} to {last:.2f}: the run diverges; lower --learning_rate, or warm up longer"
        )
    elif train[-1].step >= JUDGED_STEPS and len(train) >= LEAST and last > 0.98 * train[0].value:
        chance = math.log(origin.vocab_size) if origin.vocab_size else math.inf
        at_chance = f", where guessing lies ({chance:.2f})" if abs(last - chance) < 0.1 * chance else ""
        # A new model always learns at least how frequent tokens are; one that was trained before may know its data.
        tell = report.bad if origin.from_scratch or at_chance else report.warn
        tell(
            "loss curve",
            f"flat: {train[0].value:.2f} at step {train[0].step}, {last:.2f} at the end{at_chance}: nothing is learnt; check that "
            "--learning_rate is not too low, that labels belong to their inputs, and that gradients reach the weights",
        )


def _look_for_jumps(train: list[Point], report: Report) -> None:
    """A spike heals within some records. A jump stays: weights or optimizer state were lost, as a bad resume does it.

    Small batches alone throw three records, and once in some ten thousand eight, above all of the eight before. So most of those
    after a jump have to be far above, by the noise of the records before, too.
    """
    spikes = []
    for index in range(LEAST, len(train)):
        before = [point.value for point in train[max(0, index - WINDOW) : index]]
        usual, highest = statistics.median(before), max(before)
        far = max(usual + 1, 1.3 * usual, highest + 0.5)
        if train[index].value < far:
            continue
        after = [point.value for point in train[index : index + WINDOW]]
        noise = _noise([point.value for point in train[max(0, index - 4 * WINDOW) : index]])
        if min(after) < highest or statistics.median(after) < max(far, usual + 4 * noise):
            spikes.append(train[index])
            continue
        if len(after) < WINDOW:
            report.warn(
                "loss curve",
                f"jumps from {usual:.2f} (step {train[index - 1].step}) to {train[index].value:.2f} (step {train[index].step}); too few "
                "records follow to tell whether it stays there, so look again later",
            )
            break
        report.bad(
            "loss curve",
            f"jumps from {usual:.2f} (step {train[index - 1].step}) to {train[index].value:.2f} (step {train[index].step}) and stays "
            "there: if the run was resumed in between, it lost weights or optimizer state; else the learning rate is too high",
        )
        break  # what follows a jump is compared with the wrong past
    if spikes:
        report.warn(
            "loss curve",
            f"{len(spikes)} spikes that healed ({_steps(spikes)}); many of them: lower --learning_rate, or --skip_spikes",
        )


def _noise(values: list[float]) -> float:
    """Standard deviation of records about their trend, which differences of neighbours leave out; robust against spikes."""
    return statistics.median(abs(later - earlier) for earlier, later in pairwise(values)) / (0.6745 * math.sqrt(2))


def _look_for_overfitting(train: list[Point], val: list[Point], report: Report) -> None:
    if len(val) < 3:
        return
    best, last = min(val, key=lambda point: point.value), val[-1]
    since = [point.value for point in train if point.step > best.step]
    until = [point.value for point in train if point.step <= best.step][-WINDOW:]
    falls = bool(since and until) and statistics.median(since[-WINDOW:]) < statistics.median(until)
    if falls and last.value > best.value + max(0.05, 0.02 * best.value):
        report.warn(
            "loss curve",
            f"validation is best at step {best.step} ({best.value:.3f}) and {last.value:.3f} at the end, while the training loss falls on: "
            "the data is learnt by heart from there; use best/, fewer epochs, more data or a smaller model",
        )
