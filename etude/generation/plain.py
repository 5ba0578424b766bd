"""Sampling and decoding, plain and short: the oracle that every faster way of generating is compared with.

Rows of a batch never influence each other: each has its own probabilities, its own budget of tokens and its own source of
random numbers. So a prompt gets the same answer alone, in a batch and behind padding, up to what rounding does to ties.

Shapes: B rows (prompts), T tokens now, D hidden_size, V vocab_size.
"""

import math
import random
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etude.errors import UsageError, VerificationError
from etude.generation.settings import SamplingSettings
from etude.model.attention import KVCache
from etude.model.transformer import Etude


class Step(NamedTuple):
    """What one step of :func:`generate` did to each row."""

    tokens: list[int | None]  # the new token; None: the row has none, because it has ended
    reasons: list[str | None]  # why the row ended: "stop" (at a stop id) or "length"; None: it goes on


def next_token_probabilities(logits: Tensor, previous: Sequence[Sequence[int]], settings: SamplingSettings) -> Tensor:
    """Logits (B, V) in fp32 → the probabilities (B, V) to draw from, each row by itself.

    The filters are those of Hugging Face's ``generate``, in its order: repetition penalty, temperature, top-k, top-p,
    min-p. ``previous`` holds each row's ids so far, prompt included, padding not.
    """
    if settings.repetition_penalty != 1:  # CTRL, https://arxiv.org/abs/1909.05858
        logits = logits.clone()
        for row, ids in zip(logits, previous, strict=True):
            seen = torch.tensor(sorted(set(ids)), device=logits.device)
            penalty = settings.repetition_penalty
            row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    if settings.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(settings.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if settings.top_p < 1:  # nucleus sampling, https://arxiv.org/abs/1904.09751
        probabilities, order = logits.softmax(-1).sort(-1, descending=True)  # (B, V)
        likelier = probabilities.cumsum(-1) - probabilities  # what the tokens before this one hold together
        beyond = likelier >= settings.top_p
        beyond[:, 0] = False  # rounding must not take the likeliest
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    probabilities = logits.softmax(-1)
    if settings.min_p > 0:  # https://arxiv.org/abs/2407.01082
        unlikely = probabilities < settings.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = logits.masked_fill(unlikely, -math.inf).softmax(-1)
    return probabilities


def sample(probabilities: Tensor, sources: Sequence[random.Random]) -> list[int]:
    """Draw one token of each row of ``probabilities`` (B, V) with a number from the row's own source.

    The number picks a place on the cumulative distribution. That is done on the CPU in fp64, so a seed means the same on
    every device, and a token of probability 0 is never drawn, not even through rounding.
    """
    cumulative = probabilities.cpu().double().cumsum(-1)  # (B, V)
    places = torch.tensor([[source.random()] for source in sources], dtype=torch.float64) * cumulative[:, -1:]  # (B, 1)
    return torch.searchsorted(cumulative, places, right=True)[:, 0].tolist()


def check_prompt(ids: Sequence[int], context: int) -> None:
    """Raise :class:`UsageError` unless a prompt holds something and leaves room for one token at least."""
    if not ids:
        raise UsageError("the prompt is empty: there is nothing to continue; give it at least one token")
    if len(ids) >= context:
        raise UsageError(
            f"the prompt takes {len(ids)} tokens; the model's context holds {context}, the answer included: "
            f"shorten the prompt to at most {context - 1}"
        )


@torch.inference_mode()
def generate(
    model: Etude,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    stop_ids: Collection[int] = (),
    pad_id: int = 0,
    forbidden_ids: Collection[int] = (),
    first_row: int = 0,
) -> Iterator[Step]:
    """Continue each prompt; yields one :class:`Step` a token until every row has ended.

    A row ends with "stop" at one of ``stop_ids``, which is not given out, or with "length" at its
    ``max_new_tokens``-th token or when the context is full. ``forbidden_ids`` are never chosen: a model's vocabulary
    may be larger than its tokenizer's. The model is to be in evaluation mode. Row b draws from a source seeded by
    (seed, ``first_row`` + b): whoever splits a list of prompts into batches passes where each batch begins, and a
    prompt's answer depends neither on its company nor on the batch size.
    """
    context, device = model.config.max_position_embeddings, model.head_weight.device
    for prompt in prompts:
        check_prompt(prompt, context)
    seed = random.SystemRandom().getrandbits(63) if settings.seed is None else settings.seed
    sources = [random.Random(f"{seed}, {first_row + row}") for row in range(len(prompts))]
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]  # on the left, so that all rows end in the same column
    room = [min(settings.max_new_tokens, context - len(prompt)) for prompt in prompts]
    capacity = width + max(room)
    starts = torch.tensor(padding, device=device) if any(padding) else None
    cache = KVCache(model.config, len(prompts), capacity, like=model.head_weight, starts=starts)
    forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long, device=device)
    rows = [list(prompt) for prompt in prompts]
    reasons: list[str | None] = [None] * len(prompts)
    ids = [[pad_id] * count + row for count, row in zip(padding, rows, strict=True)]
    while None in reasons:
        hidden = model.hidden(torch.tensor(ids, device=device), cache=cache)[:, -1]  # (B, T, D) → (B, D)
        logits = model.logits(hidden).float()  # (B, V)
        if not logits.isfinite().all():
            raise VerificationError("the model's logits are not finite: its weights are damaged, or --precision is too small")
        logits[:, forbidden] = -math.inf
        chosen = sample(next_token_probabilities(logits, rows, settings), sources)
        tokens: list[int | None] = [None] * len(prompts)
        for row, token in enumerate(chosen):
            if reasons[row] is not None:
                continue
            if token in stop_ids:
                reasons[row] = "stop"
                continue
            tokens[row] = token
            rows[row].append(token)
            if len(rows[row]) - len(prompts[row]) == room[row]:
                reasons[row] = "length"
        yield Step(tokens, list(reasons))
        ids = [[pad_id if token is None else token] for token in tokens]
        if None in reasons and any(reasons):
            # Ended rows go on as padding that nobody reads; as text they would leave the context that positions end with.
            if cache.starts is None:
                cache.starts = torch.zeros(len(prompts), dtype=torch.long, device=device)
            ended = torch.tensor([reason is not None for reason in reasons], device=device)
            cache.starts = cache.starts.masked_fill(ended, capacity)
