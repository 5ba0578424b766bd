"""Muon (https://kellerjordan.github.io/posts/muon/): the momentum of each matrix, made orthogonal, is its update.

Matrices of one shape are taken together in batched products, and several processes share them out, since each would otherwise
compute the same: one by one, as torch.optim.Muon does it, they take a sixth of a small model's step on a large GPU.

Shapes: n matrices, r rows, c columns, r ≤ c (others are transposed).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from etude.parallel import Processes
from etude.training.sharding import divided_like, local, part_of, whole

# The quintic whose slope at 0 is steepest: after five rounds singular values lie between about 0.7 and 1.2 (Keller Jordan's
# post), which serves as well as 1 would.
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5
STACK_ELEMENTS = 2**27  # of matrices that are taken together: a quarter GiB of bf16, and as much again while computing


class Muon(torch.optim.Optimizer):
    """Like ``torch.optim.Muon`` with Nesterov's momentum and ``adjust_lr_fn="match_rms_adamw"`` (an update is as large as
    AdamW's, https://arxiv.org/abs/2502.16982), and with the same state. ``dtype`` is that of the products.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype = torch.bfloat16,
        processes: Processes | None = None,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.processes = dtype, processes or Processes()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameters in _stacks([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._update(parameters, group["lr"], group["weight_decay"], group["momentum"])

    def _update(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        weights, gradients = ([local(tensor) for tensor in tensors] for tensors in (parameters, [p.grad for p in parameters]))
        buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        parts = [part_of(update.to(self.dtype), parameter) for update, parameter in zip(updates, parameters, strict=True)]
        wide = [parameter.shape[0] <= parameter.shape[1] for parameter in parameters]
        stack = torch.stack([whole(part) if is_wide else whole(part).mT for part, is_wide in zip(parts, wide, strict=True)])
        orthogonal = self._shared_out(stack)  # (n, r, c)
        updates = [
            local(divided_like(update if is_wide else update.mT, parameter))
            for update, is_wide, parameter in zip(orthogonal, wide, parameters, strict=True)
        ]
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, updates, alpha=-lr * 0.2 * max(parameters[0].shape) ** 0.5)

    def _shared_out(self, stack: Tensor) -> Tensor:
        """The orthogonal matrices, (n, r, c), of which each process computes a stretch."""
        count = self.processes.count
        if count == 1:
            return orthogonalized(stack)
        each = -(-len(stack) // count)
        mine = stack[self.processes.rank * each :][:each]
        part = stack.new_zeros(each, *stack.shape[1:])
        if len(mine):
            part[: len(mine)] = orthogonalized(mine)
        return self.processes.gather(part)[: len(stack)]


def orthogonalized(stack: Tensor) -> Tensor:
    """(n, r, c) → (n, r, c): each matrix U S Vᵀ brought near to U Vᵀ, by Newton and Schulz's iteration."""
    # The norm over all elements is at least the largest singular value, which the iteration wants to be at most 1.
    norm = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=torch.promote_types(stack.dtype, torch.float32))
    x = stack / norm.clamp(min=1e-7).to(stack.dtype)
    for _ in range(ROUNDS):
        gram = x @ x.mT  # (n, r, r)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def _stacks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The matrices that may be stacked, transposed or not; no more of them at once than memory should hold."""
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
    for (rows, columns), alike in by_shape.items():
        most = max(1, STACK_ELEMENTS // (rows * columns))
        for at in range(0, len(alike), most):
            yield alike[at : at + most]
