"""The feed-forward layer: SwiGLU (https://arxiv.org/abs/2002.05202), a gated linear unit with SiLU as its gate."""

import torch.nn.functional as F
from torch import Tensor, nn

from etude.model.config import EtudeConfig


class SwiGLU(nn.Module):
    def __init__(self, config: EtudeConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
