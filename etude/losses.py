"""What training minimises. ``loss(model, batch)`` returns a sum and its weight; the trainer divides by the weight of the
whole step, so that a batch has one gradient however it is cut into micro-batches.

Shapes: B rows, T tokens of a row, N tokens in all, D hidden_size, V vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from etude.model.linear import pays, product, rounded, rounded_by_one_scale
from etude.model.transformer import Etude

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]
IGNORED = -100  # the label of a token that is not learnt
CHUNK_LOGITS = 2**27  # logits held at once on an accelerator: half a GiB of fp32
CHUNK_LOGITS_FUSED = 2**28  # where they are never held in fp32
ROWS_TOGETHER = 128  # what the number of tokens whose logits are made is a multiple of
CHUNK_LOGITS_CPU = 2**22  # small enough to be read again from cache, large enough for fast products
LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class Loss:
    sum: Tensor  # (), differentiable: nats over all supervised tokens
    weight: Tensor  # (), how many they are


def causal_lm_loss(model: Etude, batch: dict[str, Tensor], cross_entropy: CrossEntropy | None = None) -> Loss:
    """Cross-entropy of each label given the tokens up to its place.

    ``batch`` has ``ids`` and ``labels`` (B, T), the labels already one token ahead and ``IGNORED`` where nothing is
    learnt; optionally ``positions`` and ``documents`` (B, T), and ``ends`` (B, K). ``cross_entropy`` is a compiled
    :func:`linear_cross_entropy`, where the loss cannot be compiled as a whole.
    """
    parts = {name: batch.get(name) for name in ("positions", "documents", "ends")}
    hidden = model.hidden(batch["ids"], **parts).flatten(0, 1)  # (N, D)
    labels = batch["labels"].flatten()
    weight = (labels != IGNORED).sum()
    if not torch.compiler.is_compiling() and cross_entropy is None and weight < len(labels):
        # Logits are the largest tensor of all: make only those that count. (Compiled code wants fixed shapes.) And a few more, so that
        # few sizes occur: on a CPU oneDNN keeps some memory for each that it has met.
        learnt, other = ((labels != IGNORED).nonzero(), (labels == IGNORED).nonzero())
        places = torch.cat((learnt, other)).squeeze(1)[: -(-len(learnt) // ROWS_TOGETHER) * ROWS_TOGETHER]
        hidden, labels = hidden[places], labels[places]
    fp8 = model.fp8 and model.training and torch.is_grad_enabled()
    return Loss((cross_entropy or linear_cross_entropy)(hidden, model.head_weight, labels, fp8), weight)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, fp8: bool = False) -> Tensor:
    """``F.cross_entropy(hidden @ weight.T, labels, reduction="sum")`` that never holds all logits.

    ``hidden`` (N, D), ``weight`` (V, D), ``labels`` (N,); labels of ``IGNORED`` count nothing. Under autocast the
    products are in its dtype, softmax and sums always in fp32 (or fp64 for fp64 input). With ``fp8`` the logits and the gradient by
    ``hidden`` are multiplied in 8 bits.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    fused = CHUNK_LOGITS_FUSED if torch.compiler.is_compiling() else CHUNK_LOGITS
    budget = CHUNK_LOGITS_CPU if hidden.device.type == "cpu" else fused
    rows = max(1, budget // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden.to(dtype), weight.to(dtype), labels, rows, fp8 and pays(weight) and len(hidden) > 0
        )


def _nats_and_gradient(logits: Tensor, index: Tensor, wide: torch.dtype, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Of logits (rows, V) and each row's right token (rows, 1): its negative log probability (rows, 1), and the gradient of that
    by the logits (rows, V), which is softmax - one-hot. Three ways to say the same: one to be run as it stands, one to be fused,
    and one to be fused where a power takes longer than to read the row again, on a CPU.
    """
    if torch.compiler.is_compiling() and logits.device.type == "cpu":
        top = logits.amax(-1, keepdim=True).to(wide)
        # The only power: of logsumexp and softmax the compiler makes two. And those of 2 take less time than those of e.
        powers = ((logits.to(wide) - top) * LOG2_E).exp2()
        total = powers.sum(-1, keepdim=True)
        nats = total.log() + (top - logits.gather(1, index).to(wide))
        right = torch.arange(logits.shape[1], device=logits.device) == index
        gradient = torch.where(right, powers - total, powers) / total if needs_gradient else None
    elif torch.compiler.is_compiling():
        normalizer = logits.to(wide).logsumexp(-1, keepdim=True)
        nats = normalizer - logits.gather(1, index).to(wide)
        one_hot = torch.arange(logits.shape[1], device=logits.device) == index
        gradient = (logits.to(wide) - normalizer).exp() - one_hot.to(wide) if needs_gradient else None
    else:
        log_probabilities = logits.to(wide).log_softmax(-1)
        nats = -log_probabilities.gather(1, index)
        minus_one = torch.full_like(index, -1.0, dtype=wide)
        gradient = log_probabilities.exp().scatter_add(1, index, minus_one) if needs_gradient else None
    return nats, gradient.to(logits.dtype) if needs_gradient else None


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes a chunk's logits, its loss and its gradients together, then forgets the logits.

    Since the loss is a sum, its gradients are known on the way forward, up to the one factor that backward brings. The idea
    is Cut Cross-Entropy's (https://arxiv.org/abs/2411.09009) and Liger Kernel's (https://arxiv.org/abs/2410.10989).
    Nothing is changed in place: torch 2.11 compiles such a function to one whose gradients are zero.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, fp8: bool) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_gradient = any(ctx.needs_input_grad[:2])
        loss = hidden.new_zeros((), dtype=wide)
        if fp8:
            weight_fp8, transposed_fp8 = rounded(weight), rounded_by_one_scale(weight.t())
        hidden_gradients: list[Tensor] = []
        weight_gradient = None
        for chunk, target in zip(hidden.split(rows), labels.split(rows), strict=True):
            learnt = (target != IGNORED)[:, None]  # (rows, 1)
            logits = product(rounded(chunk), weight_fp8, chunk.dtype, long_sums=True) if fp8 else F.linear(chunk, weight)
            nats, gradient = _nats_and_gradient(logits, target.clamp(min=0)[:, None], wide, needs_gradient)
            loss = loss + torch.where(learnt, nats, 0.0).sum()
            if needs_gradient:
                # What is not learnt is masked on the side of the hidden states, which is smaller by V / D.
                if fp8:  # no element is beyond 1: a probability, or one less 1
                    gradient_fp8 = rounded_by_one_scale(gradient, largest=1.0)
                    hidden_gradient = product(gradient_fp8, transposed_fp8, chunk.dtype, long_sums=True)
                else:
                    hidden_gradient = gradient @ weight
                hidden_gradients.append(hidden_gradient * learnt)
                part = gradient.T @ (chunk * learnt)
                weight_gradient = part.to(wide) if weight_gradient is None else weight_gradient + part
        if needs_gradient:
            ctx.save_for_backward(torch.cat(hidden_gradients), weight_gradient)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, factor: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * factor.to(hidden_gradient.dtype), (weight_gradient * factor).to(ctx.dtype), None, None, None
