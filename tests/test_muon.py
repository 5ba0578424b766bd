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
    stack = muon._stacked([torch.randn(shape, generator=source) for shape in ((12, 30), (30, 12), (12, 30))])
    torch.testing.assert_close(stack.norm(dim=(1, 2)), torch.ones(3) / muon.MARGIN)
    values = torch.linalg.svdvals(orthogonalized(stack))
    assert values.min() > 0.8 and values.max() < 1.2
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    cosine = (orthogonalized(stack) * (u @ v)).sum((1, 2)) / (orthogonalized(stack).norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2)))
    assert cosine.min() > 0.99
    assert not orthogonalized(muon._stacked([torch.zeros(3, 4)])).any()


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


def test_a_parameter_without_a_gradient_is_left_alone():
    parameters = parameters_of(0)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1, momentum=0.9, dtype=torch.float32)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert [torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True)] == [False, *[True] * 7]
    assert list(optimizer.state) == [parameters[0]]
