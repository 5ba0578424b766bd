"""Compiled code computes what plain code does: on the CPU here, and on a CUDA device where there is one.

A fast path that is wrong can look healthy: torch 2.11 compiled an earlier form of the loss to one whose gradients were
all zero, and it trained at full speed.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from etude.device import autocast, pick_compile, pick_precision
from etude.losses import IGNORED, causal_lm_loss
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.training.muon import Muon

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


REPEAT = """
import hashlib, sys
import numpy as np
import torch
from etude.data.batches import Batches
from etude.losses import causal_lm_loss
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.training.muon import Muon
from etude.training.config import PretrainConfig
from etude.training.trainer import Trainer

class Blocks:
    block_size = 256

    def __len__(self):
        return 100

    def load(self, numbers):
        ids = np.random.default_rng(0).integers(0, 4, (len(numbers), 257))
        return {"ids": ids[:, :-1], "labels": ids[:, 1:]}

torch.manual_seed(0)
model = Etude(EtudeConfig(vocab_size=512, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=256))
config = PretrainConfig(output=sys.argv[1], block_size=256, batch_size=4, max_steps=9, device="cpu", compile="on")
trainer = Trainer(config, model, None, Batches(Blocks(), 4, 0), causal_lm_loss)
for _ in range(20):
    trainer.gradients.compute(0, trainer.batches.at(0), 1e-3, print)
    print(hashlib.sha256(torch.cat([g.flatten() for g in trainer.gradients.tensors()]).numpy()).hexdigest())
    trainer.gradients.forget()
"""


@pytest.mark.slow
def test_compiled_code_adds_up_the_same_bits_each_time(tmp_path):
    """Of a few tokens that occur often, so that threads meet at their rows of the embedding. In each of two processes,
    one of them in what the compiler takes for its own tests.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", REPEAT, str(tmp_path / "run")]
    told = [
        subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment | {"CI": ci})
        for ci in ("true", "")
    ]
    hashes = [line for process in told for line in process.stdout.split()]
    assert len(hashes) == 40 and len(set(hashes)) == 1


COMPILE = """
import torch
from torch._dynamo.utils import counters
from etude.device import autocast
from etude.losses import causal_lm_loss
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.training.muon import Muon
from etude.training.compiler import keep_gradients

keep_gradients()
torch.manual_seed(0)
model = Etude(EtudeConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16))
model.rotary.on(torch.device("cpu"))
ids = torch.arange(16)[None]
with autocast(torch.device("cpu"), "bf16"):
    result = torch.compile(causal_lm_loss, dynamic=False)(model, {"ids": ids, "labels": ids})
result.sum.backward()
print(dict(counters["aot_autograd"]).get("autograd_cache_hit", 0), sum(p.grad.double().norm() for p in model.parameters()).item())
"""


@pytest.mark.slow
def test_the_next_start_finds_the_gradients(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def start(source: str) -> tuple[str, str]:
        told = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, check=True, env=environment
        )
        return tuple(told.stdout.split())

    first, second = start(COMPILE), start(COMPILE)
    assert (first[0], second[0]) == ("0", "1") and first[1] == second[1]
    # What an autograd function does is part of the key.
    other = start(COMPILE.replace("import torch\n", "import torch\nimport etude.losses\netude.losses.LOG2_E = 1.5\n", 1))
    assert other[0] == "0" and other[1] != first[1]


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


@pytest.mark.parametrize("name", DEVICES)
def test_compiled_muon_gives_the_plain_one_s_weights_and_momenta(name):
    """Its numbers change from step to step, which compiled code must not take for constants."""
    device = torch.device(name)
    shapes, cuts = [(64, 96), (96, 64), (64, 96), (96, 64), (32, 96)], {0: (0, 16), 1: (1, 16)}

    def trained(compiled: bool) -> list[torch.Tensor]:
        source = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, generator=source).to(device)) for shape in shapes]
        heads = {weights[place]: cut for place, cut in cuts.items()}
        optimizer = Muon(weights, 0.02, 0.1, 0.9, heads, torch.float32, compiled=compiled)
        for step in range(4):
            optimizer.param_groups[0].update(lr=0.02 / (step + 1), momentum=0.85 + 0.02 * step)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=source).to(device)
            optimizer.step()
        return [*weights, *(optimizer.state[weight]["momentum_buffer"] for weight in weights)]

    torch._dynamo.reset()
    for fast, plain in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
