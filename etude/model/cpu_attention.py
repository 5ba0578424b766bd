"""Causal attention for training on a CPU: torch's fast forward, and a backward made of batched matrix products.

On a CPU whose matrix units multiply bf16 (AMX), the backward of ``F.scaled_dot_product_attention`` takes a quarter of a small
model's training step: it multiplies small tiles, while oneDNN's batched products run several times as fast. It pays only in
compiled code, which makes one pass of what stands between the products.

Shapes: B batch, T tokens, H query heads, G key and value heads, d head_dim; N = B · G, and R = H / G · T are the queries that
share a key head's keys.
"""

import math

import torch
from torch import Tensor

LONGEST = 1024  # tokens; of longer rows too much is computed that causality throws away
CHUNK_PROBABILITIES = 2**21  # probabilities held at once: 4 MiB of bf16, read again from cache
MOST_CHUNKS = 8  # each is compiled of its own

with torch.inference_mode(False):  # whoever imports this first, it must serve training
    # Compiled code would make an arange anew, in int64, for every probability; what is given to it it reads.
    _STEPS = torch.arange(LONGEST, dtype=torch.float32, device="cpu")


def pays(q: Tensor, k: Tensor) -> bool:
    """Whether :func:`causal_attention` is faster than ``F.scaled_dot_product_attention`` for such queries and keys.

    Measured on a CPU with AMX, with heads of 32 to 128 channels.
    """
    return (
        torch.compiler.is_compiling()
        and q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.requires_grad
        and 1 < q.shape[2] == k.shape[2] <= LONGEST
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)`` for CPU tensors of up to ``LONGEST`` tokens.

    ``q`` (B, H, T, d), ``k`` and ``v`` (B, G, T, d) → (B, H, T, d)
    """
    return _CausalAttention.apply(q, k, v, _STEPS[: q.shape[2]])


class _CausalAttention(torch.autograd.Function):
    """Recomputes the probabilities P on the way back from the logits' logsumexp, as FlashAttention does
    (https://arxiv.org/abs/2205.14135, algorithm 4): with the output O and its gradient dO,
    dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)), dQ = dS K, dK = dSᵀ Q.

    P and dS are held transposed, keys by queries, so that two of the three products read them as they lie.
    Nothing is changed in place: torch 2.11 compiles such a function to a wrong one.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> Tensor:
        # What F.scaled_dot_product_attention runs on a CPU; only this name gives the logsumexp, too.
        y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, logsumexp, steps)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, logsumexp, steps = ctx.saved_tensors
        (B, H, T, d), G = q.shape, k.shape[1]
        N, R, scale = B * G, H // G * T, d**-0.5
        dtype, wide = q.dtype, logsumexp.dtype
        q, y, gradient = (tensor.reshape(N, R, d) for tensor in (q, y, gradient))
        k, v = k.reshape(N, T, d), v.reshape(N, T, d)
        rowsum = (gradient.to(wide) * y.to(wide)).sum(-1)[:, None]  # (N, 1, R)
        # Two more channels subtract the logsumexp within the product: logits near 0 are the ones that count, and those bf16
        # rounds least. Rounded first, large logits would lose their digits.
        shift = logsumexp.reshape(N, R, 1) * -(d**0.5)
        high = shift.to(dtype)
        low = (shift - high.to(wide)).to(dtype)
        shifted_q, longer_k = torch.cat((q, high, low), -1), torch.cat((k, k.new_ones(N, T, 2)), -1)  # (N, R or T, d + 2)
        allowed = steps[:, None] <= steps.repeat(H // G)  # (T, R): a key's step is no later than the query's
        size = max(CHUNK_PROBABILITIES // (R * T), math.ceil(N / MOST_CHUNKS))
        gradients = []
        for a in range(0, N, size):
            rows = slice(a, a + size)
            logits = torch.bmm(longer_k[rows], shifted_q[rows].transpose(1, 2)).to(wide)  # (size, T, R), less the logsumexp
            p = torch.where(allowed, (logits * scale).exp(), 0.0)
            dp = torch.bmm(v[rows], gradient[rows].transpose(1, 2)).to(wide)
            ds = (p * ((dp - rowsum[rows]) * scale)).to(dtype)
            dq = torch.bmm(ds.transpose(1, 2), k[rows])  # (size, R, d)
            gradients.append((dq, torch.bmm(ds, q[rows]), torch.bmm(p.to(dtype), gradient[rows])))
        dq, dk, dv = (torch.cat(parts) for parts in zip(*gradients, strict=True))
        return dq.view(B, H, T, d), dk.view(B, G, T, d), dv.view(B, G, T, d), None
