"""What a GPU computes on its fast paths (16 bits, fused attention, compiled code, batched Muon) against fp64 on the CPU."""

import pytest
import torch
from test_linear import rows_held  # noqa: F401

from etude.benchmark.report import with_memory
from etude.device import autocast
from etude.losses import IGNORED, causal_lm_loss
from etude.model import linear
from etude.model.config import EtudeConfig
from etude.model.documents import attends_by_document
from etude.model.transformer import Etude
from etude.training.muon import orthogonalized

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
ROWS, LENGTH = 4, 256


def shape(**changes) -> EtudeConfig:
    values = dict(
        vocab_size=1000, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=512, max_position_embeddings=LENGTH, initializer_range=0.05,
    )  # fmt: skip
    return EtudeConfig(**{**values, **changes})


def packed_batch() -> dict[str, torch.Tensor]:
    """Rows of several documents, of which the last is padding; some labels are not learnt."""
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1000, (ROWS, LENGTH), generator=source)
    labels = ids.roll(-1, 1).masked_fill(torch.rand(ROWS, LENGTH, generator=source) < 0.3, IGNORED)
    ends = torch.tensor([[1, 100, 256, 256, 256], [256] * 5, [17, 18, 19, 200, 256], [128, 256, 256, 256, 256]])
    places = torch.arange(LENGTH)
    documents = (places[None, :, None] >= ends[:, None, :]).sum(-1)
    begins = torch.cat((torch.zeros(ROWS, 1, dtype=torch.long), ends), 1).gather(1, documents)
    return {"ids": ids, "labels": labels, "documents": documents, "positions": places - begins, "ends": ends}


def gradient_of(model: Etude, batch: dict[str, torch.Tensor], loss, precision: str) -> tuple[float, torch.Tensor]:
    device = next(model.parameters()).device
    model.zero_grad()
    with autocast(device, precision):
        result = loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
    (result.sum / result.weight).backward()
    return result.sum.item(), torch.cat([parameter.grad.flatten().double().cpu() for parameter in model.parameters()])


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"head_dim": 128}, {"qk_norm": True}])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradient_are_those_of_the_cpu_in_fp64(changes, packed, compiled):
    torch.manual_seed(0)
    model = Etude(shape(**changes))
    batch = packed_batch()
    batch = batch if packed else {name: batch[name] for name in ("ids", "labels")}
    plain = {name: tensor for name, tensor in batch.items() if name != "ends"}  # on the CPU by a mask
    wanted_sum, wanted = gradient_of(model.double(), plain, causal_lm_loss, "fp32")
    model = model.float().to(CUDA)
    model.rotary.on(CUDA)
    torch._dynamo.reset()
    loss = torch.compile(causal_lm_loss, dynamic=False) if compiled else causal_lm_loss
    for precision, allowed in (("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 1e-2)):
        found_sum, found = gradient_of(model, batch, loss, precision)
        assert abs(found_sum / wanted_sum - 1) < allowed, precision
        assert ((found - wanted).norm() / wanted.norm()).item() < allowed, precision


@pytest.mark.parametrize("compiled", [False, True])
def test_in_8_bits_loss_and_gradient_are_near_those_of_fp64(compiled, monkeypatch, rows_held):  # noqa: F811
    """Rounding to three bits changes a gradient by a tenth; a wrong scale or layout would change all of it."""
    monkeypatch.setattr(linear, "SMALLEST", 2**16)
    torch.manual_seed(0)
    model = Etude(shape(vocab_size=1024, intermediate_size=2048, tie_word_embeddings=False))
    batch = {name: tensor for name, tensor in packed_batch().items() if name in ("ids", "labels")}
    wanted_sum, wanted = gradient_of(model.double(), batch, causal_lm_loss, "fp32")
    model = model.float().to(CUDA).train()
    model.fp8 = True
    model.rotary.on(CUDA)
    torch._dynamo.reset()
    loss = torch.compile(causal_lm_loss, dynamic=False) if compiled else causal_lm_loss
    found_sum, found = gradient_of(model, batch, loss, "fp8")
    assert abs(found_sum / wanted_sum - 1) < 5e-3
    assert 2e-2 < ((found - wanted).norm() / wanted.norm()).item() < 0.15


@pytest.mark.parametrize("long_sums", [False, True])
@pytest.mark.parametrize("by", [linear.rounded, linear.rounded_by_one_scale])
def test_a_product_of_8_bits_is_that_of_what_was_rounded(by, long_sums):
    source = torch.Generator().manual_seed(0)
    pairs = [by(torch.randn(rows, 4096, generator=source).to(CUDA)) for rows in (256, 512)]
    a, b = (elements.double() * scale.double() for elements, scale in pairs)
    found = linear.product(*pairs, torch.bfloat16, long_sums).double()
    assert ((found - a @ b.t()).norm() / (a @ b.t()).norm()).item() < 4e-3


def test_packed_documents_do_not_see_each_other():
    torch.manual_seed(0)
    model = Etude(shape()).to(CUDA)
    batch = {name: tensor.to(CUDA) for name, tensor in packed_batch().items()}
    with torch.no_grad(), autocast(CUDA, "bf16"):
        assert attends_by_document(CUDA)
        parts = {name: batch[name] for name in ("positions", "documents", "ends")}
        before = model(batch["ids"], **parts)
        changed = batch["ids"].clone()
        changed[2, 19:100] += 1  # the fourth document of the third row
        after = model(changed % 1000, **parts)
    same = (before == after).all(-1).cpu()
    assert same[[0, 1, 3]].all() and same[2, :19].all() and same[2, 200:].all() and not same[2, 19:200].any()


@pytest.mark.parametrize("shape", [(6, 96, 256), (36, 128, 768), (3, 768, 2048), (3, 512, 512)])
def test_muon_in_bf16_is_as_orthogonal_as_in_fp64(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stack *= torch.logspace(0, -2, shape[1])[:, None]
    stack /= stack.norm(dim=(1, 2), keepdim=True)
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    exact, rounded = ((orthogonalized(x).double().cpu() - u @ v).norm() for x in (stack, stack.to(CUDA, torch.bfloat16)))
    assert rounded < 1.1 * exact and exact < 0.3 * (u @ v).norm()


def test_memory_is_what_was_taken_at_most_besides_what_lay_there():
    lay_there = torch.empty(2**22, dtype=torch.uint8, device=CUDA)

    def work() -> int:
        torch.empty(2**24, dtype=torch.uint8, device=CUDA)  # freed at once
        return len(lay_there)

    assert with_memory(work, CUDA) == (2**22, 2**24)
