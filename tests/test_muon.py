"""Muon: the same updates as torch's own, however its matrices are stacked and shared out."""

import pytest
import torch
from torch import nn

from etude.training import muon
from etude.training.muon import Muon, orthogonalized

SHAPES = [(16, 16), (24, 16), (16, 24), (16, 16), (24, 16), (40, 16), (1, 8), (8, 1)]


def parameters_of(seed: int) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=source)) for shape in SHAPES]


def updates_of(make, steps: int = 3) -> list[torch.Tensor]:
    """What ``steps`` steps of an optimizer add to the same weights under the same gradients."""
    parameters, source = parameters_of(0), torch.Generator().manual_seed(1)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=source) * 1e-3
        optimizer.step()
    return [parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)]


def test_an_orthogonal_matrix_has_singular_values_near_one():
    source = torch.Generator().manual_seed(0)
    shapes = ((12, 30), (30, 12), (12, 30))
    stack, _ = muon._stacked([torch.randn(shape, generator=source) for shape in shapes], [(0, shape[0]) for shape in shapes])
    torch.testing.assert_close(stack.norm(dim=(1, 2)), torch.ones(3) / muon.MARGIN)
    values = torch.linalg.svdvals(orthogonalized(stack))
    assert values.min() > 0.8 and values.max() < 1.2
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    cosine = (orthogonalized(stack) * (u @ v)).sum((1, 2)) / (orthogonalized(stack).norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2)))
    assert cosine.min() > 0.99
    assert not orthogonalized(muon._stacked([torch.zeros(3, 4)], [(0, 3)])[0]).any()


@pytest.mark.parametrize("shape", [(128, 768), (160, 250), (256, 300)])
def test_in_bf16_matrices_as_training_has_them_become_as_orthogonal(shape):
    """One direction far larger than the others, and the smallest 200 times smaller than it."""
    source = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, shape[0], generator=source, dtype=torch.float64))[0] for size in shape)
    sizes = torch.logspace(-0.7, -2.3, shape[0], dtype=torch.float64)
    sizes[0] = 1
    stack, _ = muon._stacked([(u * sizes @ v.mT).bfloat16()], [(0, shape[0])])
    found, exact = orthogonalized(stack)[0].double(), u @ v.mT
    assert (found - exact).norm() < 0.12 * exact.norm()
    assert torch.linalg.matrix_norm(found, 2) < 1.2
    assert (orthogonalized(stack.double())[0] - found).norm() < 0.05 * exact.norm()


def test_rounding_to_bf16_makes_no_matrix_large():
    """Of so many, cheaper forms of the iteration that change one Gram matrix from round to round make a hundred enormous."""
    u, _, v = torch.linalg.svd(torch.randn(3000, 8, 16, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrices = (u * torch.tensor([1.0, 0.2, 0.14, 0.1, 0.09, 0.07, 0.05, 0.03]) @ v).bfloat16()
    stack, _ = muon._stacked(list(matrices), [(0, 8)] * len(matrices))
    assert torch.linalg.matrix_norm(orthogonalized(stack).float(), 2).max() < 1.2


@pytest.mark.parametrize("elements", [2**27, 600, 1])
def test_updates_are_those_of_torch(monkeypatch, elements):
    monkeypatch.setattr(muon, "STACK_ELEMENTS", elements)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    theirs = updates_of(lambda p: torch.optim.Muon(p, **settings, adjust_lr_fn="match_rms_adamw"))
    monkeypatch.setattr(muon, "QUINTICS", [(3.4445, -4.7750, 2.0315)] * 5)  # torch's
    monkeypatch.setattr(muon, "MARGIN", 1.0)
    for dtype, tolerance in ((torch.bfloat16, 0.06), (torch.float32, 0.06)):  # torch's own products are in bf16
        ours = updates_of(lambda p, dtype=dtype: Muon(p, **settings, dtype=dtype))
        for one, other, shape in zip(ours, theirs, SHAPES, strict=True):
            assert (one - other).norm() < tolerance * other.norm(), shape
    exact = updates_of(lambda p: Muon(p, **settings, dtype=torch.float64))
    single = updates_of(lambda p: Muon(p, **settings, dtype=torch.float32))
    for one, other in zip(single, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("elements", [2**27, 1])
def test_heads_are_taken_for_themselves(monkeypatch, elements):
    """As if each head were a matrix of its own, in rows or in columns, wider than it is high or not, few or many of them."""
    monkeypatch.setattr(muon, "STACK_ELEMENTS", elements)
    cuts = [
        ((24, 16), 0, 8),
        ((16, 24), 1, 8),
        ((16, 12), 0, 16),
        ((8, 8), 0, 4),
        ((8, 40), 1, 20),
        ((40, 8), 0, 20),
        ((24, 24), 0, 24),
    ]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "dtype": torch.float64}
    source = torch.Generator().manual_seed(2)
    matrices = [nn.Parameter(torch.randn(shape, generator=source)) for shape, _, _ in cuts]
    pieces = [
        [nn.Parameter(piece.clone()) for piece in matrix.detach().split(size, along)]
        for matrix, (_, along, size) in zip(matrices, cuts, strict=True)
    ]
    heads = {matrix: (along, size) for matrix, (_, along, size) in zip(matrices[:-1], cuts, strict=False)}
    together, apart = Muon(matrices, heads=heads, **settings), Muon([part for parts in pieces for part in parts], **settings)
    for _ in range(3):
        for matrix, parts, (_, along, size) in zip(matrices, pieces, cuts, strict=True):
            matrix.grad = torch.randn(matrix.shape, generator=source)
            for part, gradient in zip(parts, matrix.grad.split(size, along), strict=True):
                part.grad = gradient.clone()
        together.step()
        apart.step()
    for matrix, parts, (shape, along, _) in zip(matrices, pieces, cuts, strict=True):
        torch.testing.assert_close(matrix.detach(), torch.cat([part.detach() for part in parts], along), msg=str(shape))


def test_a_parameter_without_a_gradient_is_left_alone():
    parameters = parameters_of(0)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1, momentum=0.9, dtype=torch.float32)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert [torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True)] == [False, *[True] * 7]
    assert list(optimizer.state) == [parameters[0]]
