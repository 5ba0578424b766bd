"""Calls each of torch's elementary functions on a CPU once, from one thread.

torch has MKL compute them, whose first call of each looks for the kernel that suits the CPU. Where several threads make that first
call together, MKL 2024 may give one of them a kernel of low accuracy: its part of the result is wrong in the fourth digit
(https://github.com/pytorch/pytorch/issues/188792). In one process of twenty the rotary table was, and stayed so.
"""

import torch

FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma",
    "log", "log10", "log1p", "log2", "sin", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip


def settle_kernels() -> None:
    """Do so in this process, before threads need them. It takes microseconds."""
    with torch.device("cpu"), torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            one = torch.ones(1, dtype=dtype)
            for name in FUNCTIONS:
                getattr(torch, name)(one)
