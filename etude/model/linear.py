"""Linear layers that may multiply in 8 bits while they are trained, and products of 8 bits.

The GPUs that multiply 8 bits do so at twice the rate of 16. Each row of a layer's matrices is divided by a scale of its own before it
is rounded, so that its largest element is the largest that the format has. Outputs and the gradients by inputs are made that way;
the gradients by weights, which add up over all tokens, in 16 bits. torchao calls this recipe ``rowwise_with_gw_hp``
(https://docs.pytorch.org/ao/stable/workflows/training.html); the format is e4m3 of https://arxiv.org/abs/2209.05433.

Shapes: N rows of tokens, K input channels, M output channels.
"""

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
MULTIPLE = 16  # what the kernels want K and M to be multiples of
SMALLEST = 2**19  # K · M: where it is less, rounding takes as long as multiplying saves (512 × 512, say)

Rounded = tuple[Tensor, Tensor]  # a matrix in 8 bits, and what it is to be multiplied by again: (R, 1) or (), in fp32


class Linear(nn.Linear):
    """``nn.Linear`` without a bias. With ``fp8`` it multiplies in 8 bits while it is trained, if it is large enough; whoever
    evaluates or decodes computes with the weights as they are.
    """

    fp8 = False

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., M)"""
        if not (self.fp8 and self.training and torch.is_grad_enabled() and pays(self.weight)):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return _LinearFP8.apply(x.flatten(0, -2).to(dtype), self.weight).view(*x.shape[:-1], -1)


def pays(weight: Tensor) -> bool:
    """Whether multiplying by ``weight`` (M, K) in 8 bits is possible, and saves time."""
    return weight.numel() >= SMALLEST and not any(size % MULTIPLE for size in weight.shape)


class _LinearFP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(rounded(x), rounded(weight), x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        by_x = product(rounded(gradient), rounded(weight.t()), x.dtype)
        return by_x, (gradient.t() @ x).to(weight.dtype)


def rounded(matrix: Tensor) -> Rounded:
    """(R, C) in 8 bits, row-major, each row with a scale of its own."""
    return _rounded(matrix, matrix.abs().amax(-1, keepdim=True).float())


def rounded_by_one_scale(matrix: Tensor, largest: float | None = None) -> Rounded:
    """(R, C) in 8 bits, row-major, with one scale. ``largest`` is what no element exceeds, where that is known."""
    if largest is None:
        return _rounded(matrix, matrix.abs().amax().float())
    return _rounded(matrix, torch.full((), largest, device=matrix.device))


def _rounded(matrix: Tensor, largest: Tensor) -> Rounded:
    scale = largest.clamp(min=1e-12) / LARGEST
    return (matrix.float() / scale).to(FP8).contiguous(), scale


def product(a: Rounded, b: Rounded, dtype: torch.dtype, long_sums: bool = False) -> Tensor:
    """``a @ b.t()`` of (N, K) and (M, K), both rounded by rows or both by one scale → (N, M) in ``dtype``.

    Tensor cores add up 8-bit products with some 14 bits. With ``long_sums`` the partial sums are added up in fp32 instead, which
    takes a little longer. The head wants that, sums over a vocabulary above all, of many small numbers and a few large ones.
    """
    (a, a_scale), (b, b_scale) = a, b
    # There is a public F.scaled_mm, but torch 2.11 does not compile it.
    return torch._scaled_mm(
        a, b.t(), a_scale, b_scale.t() if b_scale.ndim else b_scale, out_dtype=dtype, use_fast_accum=not long_sums
    )
