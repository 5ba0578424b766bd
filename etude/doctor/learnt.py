"""What a model has learnt: does it know its data, and where a reply ends.

Shapes: T tokens of a row, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from etude.doctor.behaviour import Sample, logits_of
from etude.doctor.report import Report
from etude.errors import EtudeError
from etude.llama import load_any
from etude.model.transformer import Etude

LIKELY = 5  # an end token among the so many likeliest is one that sampling reaches
LEARNT = 0.1  # nats a reply's token got likelier: less, and the run was too short to say what it does not learn


@dataclass(frozen=True)
class Learnt:
    """What a model makes of some rows: means over tokens."""

    nats: float  # of learnt tokens other than reply ends
    end_nats: float  # of tokens that end a reply
    end_likely: float  # share of them that are among the :data:`LIKELY` likeliest
    ends: int


def learnt(model: Etude, samples: list[Sample]) -> Learnt:
    nats, end_nats, likely = [], [], 0
    for sample in samples:
        if len(sample.ids) < 2:
            continue
        log_probabilities = logits_of(model, sample.ids[:-1]).log_softmax(-1)  # (T - 1, V)
        cost = -log_probabilities.gather(1, torch.tensor(sample.ids[1:])[:, None])[:, 0]
        ends = {end for end in sample.ends if 0 < end < len(sample.ids)}
        for place in range(1, len(sample.ids)):
            if place in ends:
                end_nats.append(cost[place - 1].item())
                likely += int((log_probabilities[place - 1] > -cost[place - 1]).sum() < LIKELY)
            elif sample.learnt[place]:
                nats.append(cost[place - 1].item())

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values) if values else math.nan

    return Learnt(mean(nats), mean(end_nats), likely / max(1, len(end_nats)), len(end_nats))


@dataclass(frozen=True)
class Training:
    """What is known of how a model was trained."""

    is_sft: bool | None = None  # None: nobody knows
    base: str = ""  # folder of the model that it began with
    last_loss: float | None = None  # on the rows that are looked at, as the run recorded it


def look_at_learnt(model: Etude, samples: list[Sample], training: Training, report: Report) -> None:
    """The loss on the data, and whether the end of a reply was learnt."""
    found, chance = learnt(model, samples), math.log(model.config.vocab_size)
    if math.isnan(found.nats):
        report.not_looked("loss", "the rows hold no learnt token")
        return
    said = f"{found.nats:.2f} nats a token on {len(samples)} rows; guessing costs ln({model.config.vocab_size}) = {chance:.2f}"
    last = training.last_loss
    if last is not None and found.nats > 1.3 * last + 1:
        report.bad(
            "loss",
            f"{said}; but the run's last record is {last:.2f}: these weights, tokenizer and data do not belong together; "
            "restore what was exchanged",
        )
    elif found.nats > chance + 1:
        report.warn(
            "loss", f"{said}: worse than guessing; is this the tokenizer it was trained with, and data of the kind it knows?"
        )
    else:
        report.ok("loss", said)
    if training.is_sft is False:
        report.not_looked("end token", "a pretrained model does not know it yet; SFT teaches it")
    elif not found.ends:
        report.not_looked("end token", "no reply ends in the rows that were looked at; give conversations with --data")
    else:
        _look_at_end(found, samples, training, chance, report)


def _look_at_end(found: Learnt, samples: list[Sample], training: Training, chance: float, report: Report) -> None:
    """Has the token that ends a reply been a label?

    Its row in the embedding does not tell: it moves anyway, as an input and because every other label pushes it down. So
    the model is asked, where real replies end. Nearly every reply of a trained model has it among the likeliest tokens. If
    not, the training may have been too short, rather than wrong; what tells these two apart is the model it began with. The end
    is the most frequent and most certain label of all, so whatever makes other tokens of replies likelier makes the end
    likelier by more; where they got likelier and it did not, it was masked out.
    """
    said = f"among the {LIKELY} likeliest tokens at {found.end_likely:.0%} of {found.ends} ends of replies ({found.end_nats:.2f} nats)"
    cure = "the model never stops; learn the reply's end token, too: loss mask and template must include it, and pad must be another"
    if found.end_likely >= 0.1:
        report.ok("end token", said)
        return
    before = None
    if training.is_sft and training.base and Path(training.base).is_dir():
        try:
            before = learnt(load_any(training.base), samples)
        except (EtudeError, RuntimeError, IndexError) as error:  # IndexError: a vocabulary smaller than the tokenizer's
            report.not_looked("end token", f"{training.base}, which the training began with, cannot be compared: {error}")
    if before is not None:
        gained, end_gained = before.nats - found.nats, before.end_nats - found.end_nats
        if gained < LEARNT:
            report.not_looked("end token", f"{said}; but the replies are hardly learnt yet, so this does not tell")
        elif end_gained < gained:
            report.bad(
                "end token",
                f"{said}: since the training began a reply's other tokens got likelier by {gained:.2f} nats, and its end by {end_gained:.2f}, "
                f"so it was not learnt; {cure}",
            )
        else:
            report.ok("end token", f"{said}, likelier by {end_gained:.2f} nats than when the training began")
    elif found.nats < chance / 2 and found.end_nats > chance:
        # It predicts what replies say, but their end worse than a guess: pretraining alone does that, and a masked end token.
        # Of a model alone nobody knows which of the two it is, and the first is no mistake.
        tell = report.bad if training.is_sft else report.warn
        tell("end token", f"{said}: if this is a pretrained model, it needs SFT; if it had SFT, {cure}")
    else:
        report.warn("end token", f"{said}: a short training, or none in chat; else {cure}")
