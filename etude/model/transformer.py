"""The model: a Llama, written to be read.

Shapes: B batch, T tokens, D hidden_size, V vocab_size, S tokens in the cache and now together.
Its submodules bear Hugging Face's names, so a weight has one name in the model, in the file and in the export.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etude.model.attention import Attention, Context, KVCache
from etude.model.config import EtudeConfig
from etude.model.cpu_math import settle_kernels
from etude.model.documents import attends_by_document, document_mask, flat_bounds
from etude.model.ffn import SwiGLU
from etude.model.linear import Linear
from etude.model.norm import RMSNorm
from etude.model.rope import RotaryTable

settle_kernels()


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalised before and added to the residual stream after."""

    def __init__(self, config: EtudeConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, D) → (B, T, D)"""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), context))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Etude(nn.Module):
    """A decoder-only transformer: token ids in, hidden states or logits out.

    ``hidden`` and ``logits`` are separate, so that a loss may compute logits only where it needs them, or fuse the
    head. The head's weight is ``head_weight``: the embedding's own when ``tie_word_embeddings``.
    """

    def __init__(self, config: EtudeConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config)
        self.gradient_checkpointing = False  # in training, keep what enters a layer and compute the rest anew on the way back
        self.fp8 = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights; those that write to the residual stream are smaller by sqrt(2 · layers), as in GPT-2, so that
        its variance does not grow with depth. Norms are 1.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=std / (2 * self.config.num_hidden_layers) ** 0.5)
            else:
                nn.init.normal_(parameter, std=std)

    @torch.no_grad()
    def init_weights_by_fan_in(self) -> None:
        """What enters a layer keeps its size (a standard deviation of 1 / sqrt(inputs)), and no layer writes anything yet: the
        residual stream starts with the embedding alone (https://arxiv.org/abs/2203.03466, appendix D.2). An untied head starts
        at 0 too, every token being as likely as any other, and the embedding at 1, the size that norms bring it to.
        """
        for name, parameter in self.named_parameters():
            if name == "embed_tokens.weight":
                nn.init.normal_(parameter, std=1.0 if self.lm_head is not None else self.config.initializer_range)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    @property
    def fp8(self) -> bool:
        """Whether training multiplies in 8 bits."""
        return self._fp8

    @fp8.setter
    def fp8(self, enabled: bool) -> None:
        self._fp8 = enabled
        for module in self.modules():
            if isinstance(module, Linear):
                module.fp8 = enabled

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embedded(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to what the residual stream starts with, (B, T, D)."""
        x = self.dropout(self.embed_tokens(ids))
        if torch.is_autocast_enabled(ids.device.type) and torch.get_autocast_dtype(ids.device.type) == torch.bfloat16:
            return x.bfloat16()  # and so is all of the stream: half the memory traffic. fp16 would overflow there
        return x

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) to normalised hidden states (B, T, D).

        ``documents`` (B, T) numbers the document each token belongs to; attention then stops at its boundaries, and
        ``positions`` (B, T) should restart there. ``ends`` (B, K) says the same in another way, where each of a row's
        documents ends: with it, attention on a GPU costs what the documents cost, not what the row does.
        With a ``cache`` the tokens follow those it holds, and it grows.
        """
        T, device = ids.shape[1], ids.device
        mask = bounds = None
        if cache is not None:
            positions, mask = cache.positions(T, device), cache.mask(T, device)
        elif ends is not None and attends_by_document(ids.device):
            bounds = flat_bounds(ends, T)
        elif documents is not None:
            mask = document_mask(documents)
        x = self.embedded(ids)
        cos, sin = self.rotary.on(device)  # (max_position_embeddings, d/2)
        cos, sin = (cos[:T], sin[:T]) if positions is None else (cos[positions], sin[positions])
        cos, sin = (table.view(-1, T, 1, table.shape[-1]) for table in (cos, sin))  # (B or 1, T, 1, d/2)
        context = Context(cos, sin, mask, causal=mask is None and T > 1, cache=cache, bounds=bounds)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, context, use_reentrant=False)  # https://arxiv.org/abs/1604.06174
            else:
                x = layer(x, context)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., V)."""
        return F.linear(hidden, self.head_weight)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) to logits (B, T, V); arguments as for :meth:`hidden`."""
        return self.logits(self.hidden(ids, positions, documents, cache, ends))
