"""How good a model is: loss, perplexity, bits per byte; exact match on questions with known answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.corpus.inputs import find_files
from etude.corpus.jsonl import Rejects, read_records
from etude.data.batches import Samples, as_tensors, to_device
from etude.data.sft import read_conversation
from etude.device import autocast
from etude.errors import DataError
from etude.generation.text import TextModel
from etude.losses import Loss, causal_lm_loss
from etude.model.transformer import Etude
from etude.parallel import Processes


@dataclass(frozen=True)
class LossResult:
    """Sums over a data set; every mean is taken once, at the end, so none depends on how batches were cut."""

    nats: float
    tokens: int  # supervised tokens

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits needed per UTF-8 byte of the text: comparable between tokenizers."""
        return self.nats / math.log(2) / text_bytes if text_bytes else math.nan


@torch.no_grad()
def evaluate_loss(
    model: Etude,
    samples: Samples,
    device: torch.device,
    precision: str = "fp32",
    loss: Callable[[Etude, dict[str, Tensor]], Loss] = causal_lm_loss,
    batch_size: int = 8,
    max_tokens: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
    together: bool = False,
) -> LossResult:
    """The loss over ``samples``; with ``max_tokens`` over evenly spaced ones that hold about so many places.

    Several ``processes`` share the batches; the sums are added in the batches' order, so their number changes no bit.
    With ``together`` all compute equally often, as a model that is divided over them needs.
    """
    processes = processes or Processes()
    count = len(samples)
    if max_tokens:
        count = min(count, max(1, max_tokens // samples.block_size))
    numbers = [index * len(samples) // count for index in range(count)]
    starts = range(0, count, batch_size)
    sums = torch.zeros(2, len(starts), dtype=torch.float64)  # nats and tokens of each batch
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(starts), processes.count):
            if should_stop():
                break
            index = first + processes.rank
            mine = index < len(starts)
            if not (mine or together):
                continue
            start = starts[index if mine else 0]
            batch = to_device(as_tensors(samples.load(numbers[start : start + batch_size])), device)
            with processes.overseen("while validating"), autocast(device, precision):
                result = loss(model, batch)
                if mine:
                    sums[0, index] = result.sum.cpu().double()  # in this order: Metal has no fp64
                    sums[1, index] = int(result.weight)
    finally:
        model.train(was_training)
    with processes.overseen("while validating"):
        sums = processes.sum(sums.to(device) if device.type == "cuda" else sums).cpu()
    return LossResult(math.fsum(sums[0].tolist()), int(sums[1].sum()))


@dataclass(frozen=True)
class Answer:
    """One question put to a model."""

    skill: str
    question: str
    expected: str
    given: str
    ended: bool  # the reply closed with its end token, rather than by running out of room

    @property
    def correct(self) -> bool:
        return self.given.strip() == self.expected.strip()


@dataclass(frozen=True)
class ExactMatch:
    """The share of replies that are the expected ones, in all and by skill."""

    answers: Sequence[Answer]

    @property
    def overall(self) -> float:
        return _share(answer.correct for answer in self.answers)

    @property
    def ended(self) -> float:
        """The share of replies that ended properly."""
        return _share(answer.ended for answer in self.answers)

    @property
    def by_skill(self) -> dict[str, float]:
        skills = dict.fromkeys(answer.skill for answer in self.answers)
        return {skill: _share(answer.correct for answer in self.answers if answer.skill == skill) for skill in skills}


def _share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else math.nan


def read_questions(files: Sequence[str], max_bad: int = 0) -> list[tuple[str, list[dict[str, str]]]]:
    """(skill, messages) of each question; the last message is the expected answer. Raises :class:`DataError`."""
    questions, rejects = [], Rejects(max_bad)
    for path in find_files(files):
        for place, record in read_records(path, rejects):
            try:
                messages = read_conversation(record)
            except DataError as error:
                rejects.add(place, str(error))
                continue
            questions.append((str(record.get("skill", "questions")), messages))
    if not questions:
        raise DataError(f"{', '.join(files)}: no questions in it; write conversations that end with the expected answer")
    return questions


def ask(model: TextModel, questions: Sequence[tuple[str, list[dict[str, str]]]], batch_size: int = 32) -> ExactMatch:
    """Put every question to the model, greedily, and compare the replies with the expected ones."""
    # Similar lengths side by side need little padding; each answer goes back to its question's place.
    prompts = [model.chat_ids(messages[:-1]) for _, messages in questions]
    expected = [messages[-1]["content"] for _, messages in questions]
    longest = max(len(model.tokenizer.encode(text)) for text in expected) + 16
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[Answer | None] = [None] * len(prompts)
    replies = model.replies([prompts[index] for index in order], batch_size=batch_size, temperature=0, max_new_tokens=longest)
    for index, reply in zip(order, replies, strict=True):
        skill, messages = questions[index]
        ended = reply.finish_reason == "stop"
        answers[index] = Answer(skill, messages[-2]["content"], expected[index], reply.text, ended)
    return ExactMatch(answers)
