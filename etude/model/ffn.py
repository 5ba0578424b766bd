"""The feed-forward layer: SwiGLU (https://arxiv.org/abs/2002.05202), a gated linear unit with SiLU as its gate."""

import torch.nn.functional as F
from torch import Tensor, nn

from etude.model.config import EtudeConfig
from etude.model.linear import Linear


class SwiGLU(nn.Module):
    def __init__(self, config: EtudeConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
