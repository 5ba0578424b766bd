"""Compiled code computes what plain code does: on the CPU here, and on a CUDA device where there is one.

A fast path that is wrong can look healthy: torch 2.11 compiled an earlier form of the loss to one whose gradients were
all zero, and it trained at full speed.
"""

import pytest
import torch

from etude.device import autocast, pick_compile, pick_precision
from etude.losses import IGNORED, causal_lm_loss
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def loss_and_gradient(loss, model, batch, device, precision):
    model.zero_grad()
    with autocast(device, precision):
        result = loss(model, batch)
    (result.sum / result.weight).backward()
    return result.sum.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_loss_has_the_plain_one_s_gradient(name, packed):
    device = torch.device(name)
    torch.manual_seed(0)
    config = EtudeConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = Etude(config).to(device)
    model.rotary.on(device)
    ids = torch.randint(0, 512, (4, 64), device=device)
    labels = ids.roll(-1, 1).masked_fill(torch.rand(4, 64, device=device) < 0.3, IGNORED)
    batch = {"ids": ids, "labels": labels}
    if packed:
        batch["documents"] = (torch.arange(64, device=device) // 20).expand(4, 64)
        batch["positions"] = (torch.arange(64, device=device) % 20).expand(4, 64)
    torch._dynamo.reset()
    compiled = torch.compile(causal_lm_loss, dynamic=False)
    for precision, allowed in (("fp32", 1e-5), (pick_precision("auto", device), 2e-2)):
        plain_sum, plain = loss_and_gradient(causal_lm_loss, model, batch, device, precision)
        fast_sum, fast = loss_and_gradient(compiled, model, batch, device, precision)
        assert plain.norm() > 0
        assert abs(fast_sum / plain_sum - 1) < allowed
        assert (fast - plain).norm() / plain.norm() < allowed


def test_a_cpu_compiles_only_what_is_long_and_only_where_a_compiler_works(monkeypatch):
    cpu, asked = torch.device("cpu"), []

    def compile(function):
        asked.append(function)
        return function if len(asked) == 1 else failing

    def failing(_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("sys.platform", "linux")
    assert not pick_compile("auto", cpu, 1e13) and not asked  # nothing is tried for a short run
    assert pick_compile("auto", cpu, 1e15) and not pick_compile("auto", cpu, 1e15) and len(asked) == 2
    monkeypatch.setattr("sys.platform", "darwin")
    assert not pick_compile("auto", cpu, 1e15) and len(asked) == 2
    assert pick_compile("on", cpu, 1.0) and not pick_compile("off", torch.device("cuda"), 1e15)
    assert pick_compile("auto", torch.device("cuda"), 1.0)
