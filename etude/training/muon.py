"""Muon (https://kellerjordan.github.io/posts/muon/): the momentum of each matrix, made orthogonal, is its update.

Matrices of one shape are taken together in batched products, and several processes share them out, since each would otherwise
compute the same: one by one, as torch.optim.Muon does it, they take a sixth of a small model's step on a large GPU.

Shapes: n matrices, r rows, c columns, r ≤ c (others are transposed).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from etude.parallel import Processes
from etude.training.sharding import gathered, local, own_rows

# Each round maps singular values by an odd quintic; these bring all from 0.001 on close to 1 in the fewest rounds
# (Polar Express, https://arxiv.org/abs/2505.16932). They may overshoot 1 by the margin below, in bf16.
QUINTICS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233002),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MARGIN = 1.02
STACK_ELEMENTS = 2**27  # of matrices that are taken together: a quarter GiB of bf16, and as much again while computing


class Muon(torch.optim.Optimizer):
    """Like ``torch.optim.Muon`` with Nesterov's momentum and ``adjust_lr_fn="match_rms_adamw"`` (an update is as large as
    AdamW's, https://arxiv.org/abs/2502.16982), and with the same state, but closer to orthogonal. ``dtype`` is that of the products; ``compiled``
    fuses what comes before and after them.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype = torch.bfloat16,
        processes: Processes | None = None,
        compiled: bool = False,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.processes = dtype, processes or Processes()
        functions = (_nesterov, _stacked, _add)
        self._nesterov, self._stacked, self._add = (
            torch.compile(function, dynamic=False) if compiled else function for function in functions
        )

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
        # Numbers that change come as tensors, so that compiled code serves them all.
        device, size = weights[0].device, 0.2 * max(parameters[0].shape) ** 0.5
        numbers = (momentum, 1 - lr * weight_decay, lr * size)
        momentum, kept, taken = (torch.full((), number, device=device) for number in numbers)
        parts = self._nesterov(buffers, gradients, momentum, self.dtype)
        stack = self._stacked(gathered(parts, parameters))
        orthogonal = self._shared_out(stack)  # (n, r, c)
        updates = [
            own_rows(update if parameter.shape[0] <= parameter.shape[1] else update.mT, parameter)
            for update, parameter in zip(orthogonal, parameters, strict=True)
        ]
        self._add(weights, updates, kept, taken)

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
    """(n, r, c) → (n, r, c): each matrix U S Vᵀ, of norm 1 at most, brought near to U Vᵀ by Newton and Schulz's iteration."""
    x = stack
    for a, b, c in QUINTICS:
        gram = x @ x.mT  # (n, r, r)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)  # rather than A · x added to the product: that would copy x once more
        x = polynomial @ x
    return x


def _nesterov(buffers: list[Tensor], gradients: list[Tensor], momentum: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """buffer ← momentum · buffer + (1 - momentum) · gradient. Returns the same sum once more, of the new buffer."""
    news = torch._foreach_mul(gradients, 1 - momentum)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, news)
    torch._foreach_add_(news, torch._foreach_mul(buffers, momentum))
    return [new.to(dtype) for new in news]


def _stacked(matrices: list[Tensor]) -> Tensor:
    """(n, r, c), each of norm 1 or a little less, as its largest singular value then is: what the iteration wants."""
    stack = torch.stack([matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices])
    norm = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=torch.promote_types(stack.dtype, torch.float32))
    return stack / (MARGIN * norm).clamp(min=1e-7).to(stack.dtype)


def _add(weights: list[Tensor], updates: list[Tensor], kept: Tensor, taken: Tensor) -> None:
    """weight ← kept · weight - taken · update"""
    torch._foreach_mul_(weights, kept)
    torch._foreach_sub_(weights, [update.to(weight.dtype) * taken for update, weight in zip(updates, weights, strict=True)])


def _stacks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The matrices that may be stacked, transposed or not; no more of them at once than memory should hold."""
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
    for (rows, columns), alike in by_shape.items():
        most = max(1, STACK_ELEMENTS // (rows * columns))
        for at in range(0, len(alike), most):
            yield alike[at : at + most]
