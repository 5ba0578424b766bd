"""RMSNorm (https://arxiv.org/abs/1910.07467): divide by the root mean square of the channels, scale each channel."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D) in the same dtype; computed in fp32 at least, since squares overrun bf16's few digits."""
        if x.dtype.itemsize >= 4:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)
