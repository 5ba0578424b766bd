"""Grouped-query attention and the cache of keys and values.

Grouped-query attention (https://arxiv.org/abs/2305.13245) lets several query heads share one key and value head;
with as many key heads as query heads it is multi-head attention.

Shapes: B batch, T tokens now, S tokens seen so far, D hidden_size, H query heads, G key and value heads, d head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.model import cpu_attention
from etude.model.config import EtudeConfig
from etude.model.documents import attend_by_document
from etude.model.linear import Linear
from etude.model.norm import RMSNorm
from etude.model.rope import rotate


class KVCache:
    """Keys and values of the tokens seen so far, so that decoding computes each only once.

    Rows may be left-padded: row b's first token stands at column ``starts[b]``, and the columns before it are never
    attended to. Memory: 2 · layers · B · G · capacity · d elements, taken at once.
    """

    def __init__(self, config: EtudeConfig, batch: int, capacity: int, like: Tensor, starts: Tensor | None = None):
        """Room for ``capacity`` tokens in each of ``batch`` rows, with the dtype and device of ``like``."""
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        place = {"dtype": like.dtype, "device": like.device}  # not like.new_zeros: a divided weight's would be divided, too
        self.keys = [torch.zeros(shape, **place) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, **place) for _ in range(config.num_hidden_layers)]
        self.starts = starts
        self.length = 0  # columns filled in every layer

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, G, T, d) to a layer; return all its keys and values, (B, G, S, d)."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions of the next ``tokens`` columns, (B or 1, T); a row's first token is at position 0."""
        columns = torch.arange(self.length, self.length + tokens, device=device)[None]
        return columns if self.starts is None else (columns - self.starts[:, None]).clamp(min=0)

    def mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Which of the S columns the next ``tokens`` may see, (B or 1, 1, T, S); None where each may see all, or where
        nothing came before, so that the plain causal rule serves.
        """
        if self.starts is None and (tokens == 1 or self.length == 0):
            return None
        rows = torch.arange(self.length, self.length + tokens, device=device)[:, None]
        columns = torch.arange(self.length + tokens, device=device)[None, :]
        mask = (columns <= rows)[None]
        if self.starts is not None:
            # A padding column sees itself, so that its softmax has something to sum over.
            mask = mask & ((columns >= self.starts[:, None, None]) | (columns == rows))
        return mask[:, None]


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    cos: Tensor  # (B or 1, T, 1, d/2)
    sin: Tensor
    mask: Tensor | None  # (B or 1, 1, T, S), True where attention may look; None: causal, or all of the cache for T = 1
    causal: bool  # there is no mask and T > 1
    bounds: Tensor | None  # (documents + 1,): instead of a mask, where each document begins and ends in the B · T tokens
    cache: KVCache | None


class Attention(nn.Module):
    def __init__(self, config: EtudeConfig, layer: int):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, d
        self.groups = config.num_attention_heads // config.num_key_value_heads  # query heads per key head
        self.q_proj = Linear(D, config.num_attention_heads * d)
        self.k_proj = Linear(D, config.num_key_value_heads * d)
        self.v_proj = Linear(D, config.num_key_value_heads * d)
        self.o_proj = Linear(config.num_attention_heads * d, D)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, D) → (B, T, D)"""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, d)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, G, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        if context.bounds is not None:
            return self.o_proj(attend_by_document(q, k, v, context.bounds).reshape(B, T, -1))
        # Transposed last: the kernels read this layout as it is, and write theirs so that the way back copies nothing.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, d)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)  # (B, G, S, d)
        groups = self.groups
        if context.mask is not None and groups > 1:  # with a mask, no fast kernel shares key heads between query heads
            k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
        if context.causal and cpu_attention.pays(q, k):
            y = cpu_attention.causal_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=context.mask, is_causal=context.causal, enable_gqa=groups > 1
            )  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
