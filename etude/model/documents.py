"""Attention that stops at the boundaries of documents packed into one row.

Any device can do it with a mask, which makes attention look at the whole row and hide most of it. A GPU of the last years has a
kernel that takes all rows as one stretch of documents of different lengths, and looks at each by itself.

Shapes: B batch, T tokens, N = B · T, K documents of a row at most, H query heads, G key and value heads, d head_dim.
"""

import inspect
from contextlib import suppress

import torch
from torch import Tensor

_PARAMETERS = {}
if torch.backends.cuda.is_built():  # importing it takes a second, which a CPU's user would wait for in vain
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        _PARAMETERS = inspect.signature(varlen_attn).parameters


def document_mask(documents: Tensor) -> Tensor:
    """(B, T) document numbers → (B, 1, T, T), True where a token may look: backwards, within its document."""
    T = documents.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def attends_by_document(device: torch.device) -> bool:
    """Whether :func:`attend_by_document` works here: in 16 bits on a CUDA device from Ampere on, since torch 2.11."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda") or "window_size" not in _PARAMETERS:
        return False
    return torch.cuda.get_device_properties(device).major >= 8


def flat_bounds(ends: Tensor, length: int) -> Tensor:
    """Where each document of each row ends, (B, K), rows padded with ``length`` → where the documents begin and end when the
    rows are laid end to end, (B · K + 1,) in int32. A row's unused places become documents of no tokens.
    """
    rows = torch.arange(len(ends), device=ends.device)[:, None] * length
    return torch.nn.functional.pad((ends + rows).flatten(), (1, 0)).int()


def attend_by_document(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Causal attention of q (B, T, H, d) to k and v (B, T, G, d) within documents; ``bounds`` as :func:`flat_bounds` gives them.
    Returns (B, T, H, d).
    """
    length = q.shape[1]  # no document is longer
    grouped = {"enable_gqa": q.shape[2] > k.shape[2]} if "enable_gqa" in _PARAMETERS else {}  # before, without being asked
    flat = (tensor.flatten(0, 1) for tensor in (q, k, v))  # (N, heads, d)
    y = varlen_attn(*flat, bounds, bounds, length, length, window_size=(-1, 0), **grouped)
    return y.view_as(q)
