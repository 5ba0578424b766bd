"""Causal attention for training on a CPU: torch's fast forward, and a backward made of batched matrix products.

Where the CPU multiplies bf16 in tiles (AMX), the backward of ``F.scaled_dot_product_attention`` takes a quarter of a small
model's training step: oneDNN's batched products get through the same work several times as fast, though they compute what
causality throws away, too. It pays in compiled code, which makes one pass of what stands between two products.

Shapes: B batch, T tokens, H query heads, G key and value heads, d head_dim; N = B · G, and R = H / G · T are the queries that
share a key head.
"""

import math

import torch
from torch import Tensor

LONGEST = 512  # tokens; of 1024 torch takes less time, for it computes nothing that causality throws away
CHUNK_PROBABILITIES = 2**22  # computed at once: twice 16 MiB of fp32, twice 8 MiB of bf16
MOST_CHUNKS = 8  # each is compiled of its own
MOST_PROBABILITIES = 2**26  # of a whole batch: then a chunk takes 100 MB
LOG2_E = 1 / math.log(2)

with torch.inference_mode(False):  # whoever imports this first, it must serve training
    # Compiled code would make an arange anew, in int64, for every single probability. What it is given, it reads.
    _STEPS = torch.arange(LONGEST, dtype=torch.float32, device="cpu")


def _multiplies_in_tiles() -> bool:
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if features:
        return bool(features.get("amx_bf16"))
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # torch 2.10 has no public question


_TILES = _multiplies_in_tiles()  # asked here, since the compiler follows no such question


def pays(q: Tensor, k: Tensor) -> bool:
    """Whether :func:`causal_attention` is faster than ``F.scaled_dot_product_attention`` for causal ``q`` (B, H, T, d) and ``k``
    (B, G, S, d). A cache makes S larger than T: there is nothing to differentiate.
    """
    B, H, T, _ = q.shape
    return (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and 1 < T == k.shape[2] <= LONGEST
        and B * H * T * T <= MOST_PROBABILITIES
        and _TILES
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)`` for CPU tensors of at most ``LONGEST`` tokens.

    ``q`` (B, H, T, d), ``k`` and ``v`` (B, G, T, d) → (B, H, T, d)
    """
    return _CausalAttention.apply(q, k, v, _STEPS[: q.shape[2]])


class _CausalAttention(torch.autograd.Function):
    """On the way back the probabilities P are computed again, from the logits and their logsumexp, as FlashAttention does
    (https://arxiv.org/abs/2205.14135, algorithm 4). With the output O and its gradient dO:
    dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)), dQ = dS K, dK = dSᵀ Q.

    P and dS are held transposed, keys by queries: so two of the three products that read them read them as they lie.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> Tensor:
        # What F.scaled_dot_product_attention comes to on a CPU. Only under this name does it give the logsumexp, too.
        y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, logsumexp, steps)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, logsumexp, steps = ctx.saved_tensors
        (B, H, T, d), G = q.shape, k.shape[1]
        N, R, scale, dtype, wide = B * G, H // G * T, d**-0.5, q.dtype, logsumexp.dtype
        q, y, gradient = (tensor.reshape(N, R, d) for tensor in (q, y, gradient))
        k, v = (tensor.reshape(N, T, d) for tensor in (k, v))
        rowsum = (gradient.to(wide) * y.to(wide)).sum(-1)[:, None]  # (N, 1, R)
        logsumexp = logsumexp.reshape(N, 1, R) * LOG2_E  # powers of 2 take less time than those of e
        allowed = steps[:, None] <= steps.repeat(H // G)  # (T, R): no key is later than the query
        size = max(1, CHUNK_PROBABILITIES // (T * R), math.ceil(N / MOST_CHUNKS))
        gradients = []
        for start in range(0, N, size):
            rows = slice(start, start + size)
            logits = _wide_product(k[rows], q[rows], wide)  # (size, T, R)
            p = torch.where(allowed, (logits * (scale * LOG2_E) - logsumexp[rows]).exp2(), 0.0)
            dp = _wide_product(v[rows], gradient[rows], wide)
            ds = (p * ((dp - rowsum[rows]) * scale)).to(dtype)
            dq = torch.bmm(ds.transpose(1, 2), k[rows])  # (size, R, d)
            gradients.append((dq, torch.bmm(ds, q[rows]), torch.bmm(p.to(dtype), gradient[rows])))
        dq, dk, dv = (torch.cat(parts) for parts in zip(*gradients, strict=True))
        return dq.view(B, H, T, d), dk.view(B, G, T, d), dv.view(B, G, T, d), None


def _wide_product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """``a`` (N, T, d) by ``b`` (N, R, d) → (N, T, R), added up and given in ``wide``.

    ``torch.bmm`` of bf16 rounds its result to bf16. Logits of 30 would then be off by up to 1/16, and so would be the logarithms
    of probabilities; and dO Vᵀ would lose what is left of it after the row's sum is taken away. To round in steps, and put the
    parts together again, is no way out: the compiler takes such roundings away.
    """
    if a.dtype == wide:
        return torch.bmm(a, b.transpose(1, 2))
    product = torch.empty(a.shape[0], a.shape[1], b.shape[1], dtype=wide, device=a.device)
    torch.ops.etude.product_of_bf16(a.to(wide), b.to(wide), product)
    return product


def _product_of_bf16(a: Tensor, b: Tensor, product: Tensor) -> None:
    """Write to ``product`` (N, T, R) what ``a`` (N, T, d) by ``b`` (N, R, d) is. All are fp32, but the values of ``a`` and ``b``
    are such as bf16 has, too: so oneDNN may multiply them as bf16, in tiles, and loses nothing, for it adds up in fp32.

    ``torch.bmm(..., out_dtype=torch.float32)`` would say as much, but says it to GPUs only (torch 2.13).
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        torch.bmm(a, b.transpose(1, 2), out=product)
    finally:
        settings.fp32_precision = before


# An operation of its own, for the compiler cannot tell that the setting belongs to the product. It writes to what it is given,
# so that compiled code may use one piece of memory for chunk after chunk, and layer after layer.
if not hasattr(torch.ops.etude, "product_of_bf16"):  # else this module is imported anew, in a notebook
    torch.library.define("etude::product_of_bf16", "(Tensor a, Tensor b, Tensor(a!) product) -> ()")
    torch.library.impl("etude::product_of_bf16", "cpu", _product_of_bf16)
    torch.library.register_fake("etude::product_of_bf16", lambda a, b, product: None)
