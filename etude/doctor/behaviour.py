"""What a model computes: is every number finite, and does nothing look ahead.

Shapes: T tokens of a row, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from etude.chat import ChatFormat
from etude.data.sft import cut
from etude.doctor.data import DataSet
from etude.doctor.report import Report, some_of
from etude.model.transformer import Etude
from etude.tokenizer import Tokenizer

LONGEST = 512  # tokens of a row: the logits of more would not fit a small machine for a large vocabulary
LEAK = 1e-5  # of the largest logit. fp32 is exact to 1e-7; whoever sees the future moves logits by percents


class Sample(NamedTuple):
    place: str
    ids: list[int]
    learnt: list[bool]
    ends: list[int]  # places of the tokens that end a reply


def samples_of(data: DataSet, tokenizer: Tokenizer, context: int, count: int) -> list[Sample]:
    """Evenly spaced rows as ids, as training has them, at most a context long."""
    limit = min(context, LONGEST)
    rows = data.rows[:: max(1, len(data.rows) // count)][:count]
    if not data.conversations:
        end = tokenizer.document_end_id  # stands before a document as well as after it
        encoded = [[end, *ids, end][:limit] for ids in tokenizer.encode_batch([row.text for row in rows])]
        return [Sample(row.place, ids, [True] * len(ids), []) for row, ids in zip(rows, encoded, strict=True)]
    samples = []
    for row, chat in zip(rows, ChatFormat(tokenizer).encode_batch([row.messages for row in rows]), strict=True):
        chat, _ = cut(chat, limit)
        samples.append(Sample(row.place, chat.ids, chat.mask, [end - 1 for end in chat.ends]))
    return samples


def look_at_behaviour(model: Etude, samples: list[Sample], report: Report) -> bool:
    """Finite numbers and causality; whether the numbers can be used."""
    size = model.config.vocab_size
    if any(max(sample.ids, default=0) >= size for sample in samples):
        report.not_looked("activations", "the tokenizer has ids beyond the model's vocabulary")
        return False
    finite = False
    with report.examining("activations"):
        finite = look_at_activations(model, samples, report)
    if finite:
        with report.examining("causality"):
            look_at_causality(model, report)
    return finite


# --- where NaN begins ------------------------------------------------------------------------------------------------


def look_at_activations(model: Etude, samples: list[Sample], report: Report) -> bool:
    """Name the first module that turns finite numbers into others, and the first row that makes it do so."""
    rows = [(sample.place, sample.ids) for sample in samples if sample.ids]
    if not rows:
        length = min(model.config.max_position_embeddings, 64)
        rows = [("made-up tokens", _made_up(model, length))]
    bad = [(place, where) for place, ids in rows if (where := first_non_finite(model, ids))]
    if not bad:
        what = f"{len(rows)} rows of the data" if samples else "made-up tokens (no data given)"
        report.ok("activations", f"finite in every module, on {what}")
        return True
    first = {where: place for place, where in reversed(bad)}  # a row for each module
    report.bad(
        "activations",
        f"{len(bad)} of {len(rows)} rows give numbers that are not finite, though the weights are: first in "
        f"{some_of([f'{where}, at {place}' for where, place in first.items()])}; numbers overflow there: look at that row, and at that "
        "module's weights; lower --learning_rate",
    )
    return False


def first_non_finite(model: Etude, ids: list[int]) -> str:
    """The module, in the order of computation, whose output is the first that is not finite; "" if all are."""
    found: list[str] = []

    def watch(name: str):
        def hook(module, inputs, output) -> None:
            if found or not isinstance(output, Tensor) or output.isfinite().all():
                return
            given = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
            began_before = any(not value.isfinite().all() for value in given)
            found.append(f"{name.rpartition('.')[0]} (before {name.rpartition('.')[2]})" if began_before else name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        logits = logits_of(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "" if logits.isfinite().all() else "the head"


@torch.no_grad()
def logits_of(model: Etude, ids: list[int]) -> Tensor:
    """(T, V)"""
    return model(torch.tensor([ids]))[0]


def _made_up(model: Etude, length: int) -> list[int]:
    return [number * 7919 % model.config.vocab_size for number in range(length)]  # 7919, a prime: ids from all over


# --- causality -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def look_at_causality(model: Etude, report: Report) -> None:
    """Change later tokens, and look whether earlier logits notice; then another document's tokens of the same row."""
    length = min(model.config.max_position_embeddings, 64)
    if length < 4 or model.config.vocab_size < 4:
        report.not_looked("causality", "the model's context or vocabulary is too small to try")
        return
    ids = torch.tensor([_made_up(model, length)])  # (1, T)
    changed = ids.clone()
    leaks = []
    usual = model(ids)
    for first in (length - 1, length // 2, 1):
        changed[:, first:] = (ids[:, first:] + 1) % model.config.vocab_size
        leaks.append(_difference(usual[:, :first], model(changed)[:, :first]))
    if max(leaks) > LEAK:
        report.bad(
            "causality",
            f"a token's logits change by up to {max(leaks):.1%} when later tokens do: attention sees what it is to predict, so the "
            "loss falls to nothing and the model cannot write; check the causal mask",
        )
    else:
        report.ok("causality", "later tokens do not change earlier logits")
    half = length // 2
    documents = (torch.arange(length) >= half).long()[None]
    positions = torch.arange(length)[None] - documents * half
    other = ids.clone()
    other[:, :half] = (ids[:, :half] + 1) % model.config.vocab_size
    packed = [model(row, positions=positions, documents=documents)[:, half:] for row in (ids, other)]
    if (leak := _difference(*packed)) > LEAK:
        report.bad(
            "packed rows",
            f"a document's logits change by up to {leak:.1%} with the document packed before it: replies are learnt from strangers' "
            "questions; check the mask at document boundaries",
        )
    else:
        report.ok("packed rows", "documents of one row do not see each other")


def _difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max().clamp(min=1e-30)).item()
