"""Muon (https://kellerjordan.github.io/posts/muon/): the momentum of each matrix, made orthogonal, is its update.

Matrices of one shape are taken together in batched products, and several processes share them out, since each would otherwise
compute the same: one by one, as torch.optim.Muon does it, they take a sixth of a small model's step on a large GPU.
Attention's heads, which have nothing to do with each other but lie in one matrix, may be made orthogonal each for itself. That is better,
and takes fewer operations.

Shapes: n matrices or heads, r rows, c columns, r ≤ c (others are transposed).
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
SHARED_ELEMENTS = 2**16  # of a stack that processes share out: a smaller one is sooner made than sent


class Muon(torch.optim.Optimizer):
    """Like ``torch.optim.Muon`` with Nesterov's momentum and ``adjust_lr_fn="match_rms_adamw"`` (an update is as large as
    AdamW's, https://arxiv.org/abs/2502.16982), and with the same state, but closer to orthogonal. ``heads`` says of which matrices
    stretches are taken for themselves: ``(0, 64)`` of 64 rows, ``(1, 64)`` of 64 columns. ``dtype`` is that of the products;
    ``compiled`` fuses what comes before and after them.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float,
        heads: dict[nn.Parameter, tuple[int, int]] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        processes: Processes | None = None,
        compiled: bool = False,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.heads, self.dtype, self.processes = heads or {}, dtype, processes or Processes()
        functions = (_nesterov, _stacked, _add)
        self._nesterov, self._stacked, self._add = (
            torch.compile(function, dynamic=False) if compiled else function for function in functions
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameters in self._alike([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._update(parameters, group["lr"], group["weight_decay"], group["momentum"])

    def _update(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        weights, gradients = ([local(tensor) for tensor in tensors] for tensors in (parameters, [p.grad for p in parameters]))
        buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        # Numbers that change come as tensors, so that compiled code serves them all.
        device, size = weights[0].device, 0.2 * self._shape(parameters[0])[1] ** 0.5
        numbers = (momentum, 1 - lr * weight_decay, lr * size)
        momentum, kept, taken = (torch.full((), number, device=device) for number in numbers)
        parts = self._nesterov(buffers, gradients, momentum, self.dtype)
        cuts = [self._cut(parameter) for parameter in parameters]
        stack, counts = self._stacked(gathered(parts, parameters), cuts)
        updates = [
            own_rows(_joined(update, cut, parameter.shape), parameter)
            for update, cut, parameter in zip(self._shared_out(stack).split(counts), cuts, parameters, strict=True)
        ]
        self._add(weights, updates, kept, taken)

    def _cut(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Along which dimension a matrix is cut, and every how many rows or columns; it may be all of them."""
        return self.heads.get(parameter, (0, parameter.shape[0]))

    def _shape(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(r, c) of what a matrix is cut into."""
        along, size = self._cut(parameter)
        rows, columns = sorted((size, parameter.shape[1 - along]))
        return rows, columns

    def _alike(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """The matrices that may be stacked, transposed or not; no more of them at once than memory should hold."""
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(self._shape(parameter), []).append(parameter)
        for alike in by_shape.values():
            most = max(1, STACK_ELEMENTS // max(parameter.numel() for parameter in alike))
            for at in range(0, len(alike), most):
                yield alike[at : at + most]

    def _shared_out(self, stack: Tensor) -> Tensor:
        """The orthogonal matrices, (n, r, c), of which each process computes a stretch."""
        count = self.processes.count
        if count == 1 or stack.numel() < SHARED_ELEMENTS:
            return orthogonalized(stack)
        each = -(-len(stack) // count)
        mine = stack[self.processes.rank * each :][:each]
        part = stack.new_zeros(each, *stack.shape[1:])
        if len(mine):
            part[: len(mine)] = orthogonalized(mine)
        return self.processes.gather(part)[: len(stack)]


def orthogonalized(stack: Tensor) -> Tensor:
    """(n, r, c) → (n, r, c): each matrix U S Vᵀ, of norm 1 at most, brought near to U Vᵀ by Newton and Schulz's iteration.

    Every round computes its Gram matrix anew. To change that of the round before instead (Gram Newton–Schulz) would take fewer operations,
    but in bf16 rounding now and then makes such a matrix thousands of times too large.
    """
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


def _stacked(matrices: list[Tensor], cuts: list[tuple[int, int]]) -> tuple[Tensor, list[int]]:
    """(n, r, c), each of norm 1 or a little less, as its largest singular value then is: what the iteration wants. And how many of them
    are each matrix's.
    """
    parts = [
        matrix.unflatten(along, (-1, size)).movedim(along, 0) for matrix, (along, size) in zip(matrices, cuts, strict=True)
    ]
    stack = torch.cat([part if part.shape[1] <= part.shape[2] else part.mT for part in parts])
    norm = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True, dtype=torch.promote_types(stack.dtype, torch.float32))
    return stack / (MARGIN * norm).clamp(min=1e-7).to(stack.dtype), [len(part) for part in parts]


def _joined(stack: Tensor, cut: tuple[int, int], shape: torch.Size) -> Tensor:
    """The matrix of ``shape`` that was cut into ``stack``, (n, r, c)."""
    along, size = cut
    rows, columns = (size, shape[1]) if along == 0 else (shape[0], size)
    return (stack if rows <= columns else stack.mT).movedim(0, along).reshape(shape)


def _add(weights: list[Tensor], updates: list[Tensor], kept: Tensor, taken: Tensor) -> None:
    """weight ← kept · weight - taken · update"""
    torch._foreach_mul_(weights, kept)
    torch._foreach_sub_(weights, [update.to(weight.dtype) * taken for update, weight in zip(updates, weights, strict=True)])
