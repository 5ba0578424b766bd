"""What training minimises. ``loss(model, batch)`` returns a sum and its weight; the trainer divides by the weight of the
whole step, so that a batch has one gradient however it is cut into micro-batches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from etude.model.transformer import Etude

IGNORED = -100  # the label of a token that is not learnt


@dataclass(frozen=True)
class Loss:
    sum: Tensor  # (), differentiable: nats over all supervised tokens
    weight: Tensor  # (), how many they are


def causal_lm_loss(model: Etude, batch: dict[str, Tensor]) -> Loss:
    """Cross-entropy of each label given the tokens up to its place.

    ``batch`` has ``ids`` and ``labels`` (B, T), the labels already one token ahead and ``IGNORED`` where nothing is
    learnt; optionally ``positions`` and ``documents`` (B, T).
    """
    hidden = model.hidden(batch["ids"], batch.get("positions"), batch.get("documents")).flatten(0, 1)  # (B·T, D)
    labels = batch["labels"].flatten()
    if not torch.compiler.is_compiling():
        # Logits are the largest tensor of all: make only those that count. (Compiled code wants fixed shapes.)
        learnt = (labels != IGNORED).nonzero().squeeze(1)
        if len(learnt) < len(labels):
            hidden, labels = hidden[learnt], labels[learnt]
    logits = model.logits(hidden).float()  # (N, V)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return Loss(loss, (labels != IGNORED).sum())
