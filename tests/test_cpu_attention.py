"""Attention's own backward on a CPU has the gradients of the formula, and no less exactly than torch's has them."""

import pytest
import torch
import torch.nn.functional as F

from etude.losses import causal_lm_loss
from etude.model import attention, cpu_attention
from etude.model.attention import KVCache
from etude.model.config import EtudeConfig
from etude.model.cpu_attention import causal_attention, pays
from etude.model.transformer import Etude

SHAPES = [  # B, H, G, T, d, size of queries and keys
    (2, 4, 4, 1, 64, 1.0),
    (2, 4, 4, 7, 64, 1.0),
    (2, 4, 2, 64, 64, 1.0),
    (2, 3, 3, 100, 48, 2.0),
    (2, 4, 1, 255, 32, 0.3),
    (2, 4, 4, 256, 64, 1.0),
    (2, 4, 2, 256, 64, 8.0),  # logits of hundreds
    (2, 4, 2, 300, 64, 3.0),
    (1, 4, 2, 512, 128, 1.0),
]


def torch_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def plain_attention(q, k, v):
    """The formula, as autograd differentiates it."""
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1) @ v


def inputs(shape, dtype, offset=0.0):
    """Queries, keys, values and the output's gradient, transposed views as the model passes them. ``offset`` is common to all
    values, as it is in trained models: it moves what every query gets, and no gradient of queries and keys.
    """
    B, H, G, T, d, size = shape
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(B, T, heads, d) for heads in (H, G, G, H))
    return [tensor.to(dtype).transpose(1, 2) for tensor in (q * size, k * size, v + offset, gradient)]


def output_and_gradients(attention, q, k, v, gradient):
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    y = attention(q, k, v)
    y.backward(gradient)
    return [y.detach(), q.grad, k.grad, v.grad]


def errors(found, exact):
    """‖found - exact‖ / ‖exact‖ of the gradients of q, k and v."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found[1:], exact[1:], strict=True)]


@pytest.mark.parametrize("shape", SHAPES[1:])  # a single token's probability is 1, whatever its query and key
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_formula(shape, dtype):
    given = inputs(shape, dtype)
    exact = output_and_gradients(plain_attention, *(tensor.double() for tensor in given))
    found = output_and_gradients(causal_attention, *given)
    assert max(errors(found, exact)) < (1e-4 if dtype == torch.float32 else 1e-12)


def test_a_single_token_gives_its_gradient_to_its_value_alone():
    q, k, v, gradient = inputs(SHAPES[0], torch.bfloat16)
    _, dq, dk, dv = output_and_gradients(causal_attention, q, k, v, gradient)
    assert torch.equal(dv, gradient)
    assert dq.abs().max() < 1e-2 and dk.abs().max() < 1e-2  # rounding


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_in_bf16_it_is_as_exact_as_torch(shape, offset):
    given = inputs(shape, torch.bfloat16, offset)
    exact = output_and_gradients(plain_attention, *(tensor.double() for tensor in given))
    own, torchs = output_and_gradients(causal_attention, *given), output_and_gradients(torch_attention, *given)
    assert torch.equal(own[0], torchs[0])
    for mine, theirs in zip(errors(own, exact), errors(torchs, exact), strict=True):
        assert mine < 1.25 * theirs


def test_chunks_change_nothing(monkeypatch):
    given = inputs((3, 4, 2, 40, 16, 1.0), torch.float64)  # six key heads
    whole = output_and_gradients(causal_attention, *given)
    for probabilities, most in ((1, 6), (4 * 2 * 40 * 40, 6), (1, 2)):  # chunks of 1; of 4 and 2; of 3
        monkeypatch.setattr(cpu_attention, "CHUNK_PROBABILITIES", probabilities)
        monkeypatch.setattr(cpu_attention, "MOST_CHUNKS", most)
        for a, b in zip(output_and_gradients(causal_attention, *given), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 4, 255, 64, 1.0), (4, 4, 2, 256, 64, 3.2), (2, 3, 1, 100, 48, 1.0)],  # 3.2: logits of standard deviation 10
)
@pytest.mark.parametrize("chunk", [2**18, 2**22])
def test_compiled_it_is_as_exact(shape, chunk, monkeypatch):
    """A compiler that keeps more digits than the program says would break what rests on rounding."""
    monkeypatch.setattr(cpu_attention, "CHUNK_PROBABILITIES", chunk)
    given = inputs(shape, torch.bfloat16, offset=3.0)
    exact = output_and_gradients(plain_attention, *(tensor.double() for tensor in given))
    torch._dynamo.reset()
    own = output_and_gradients(torch.compile(causal_attention, dynamic=False), *given)
    torchs = output_and_gradients(torch_attention, *given)
    assert torch.equal(own[0], torchs[0])
    for mine, theirs in zip(errors(own, exact), errors(torchs, exact), strict=True):
        assert mine < 1.25 * theirs


def test_the_precision_of_other_products_stays_as_it_was():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    given = inputs(SHAPES[2], torch.bfloat16)
    output_and_gradients(causal_attention, *given)
    assert settings.fp32_precision == before
    with pytest.raises(RuntimeError):
        cpu_attention._product_of_bf16(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, 2))
    assert settings.fp32_precision == before


@pytest.fixture
def compiling(monkeypatch):
    """As on a CPU that has tiles, in code that is being compiled."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(cpu_attention, "_TILES", True)


def test_it_is_used_only_where_it_pays(monkeypatch, compiling):
    q, k, _, _ = inputs((1, 4, 2, 64, 64, 1.0), torch.bfloat16)
    assert pays(q, k)
    assert not pays(q.float(), k.float()) and not pays(q.half(), k.half()) and not pays(q.to("meta"), k.to("meta"))
    assert not pays(q[:, :, :1], k[:, :, :1]) and not pays(q[:, :, :2], k)  # a single token; a cache
    longer = q.repeat(1, 1, 1 + cpu_attention.LONGEST // 64, 1)
    assert not pays(longer, longer)
    many = q.expand(1 + cpu_attention.MOST_PROBABILITIES // (4 * 64 * 64), -1, -1, -1)
    assert not pays(many, many)
    with torch.no_grad():
        assert not pays(q, k)
    monkeypatch.setattr(cpu_attention, "_TILES", False)
    assert not pays(q, k)
    monkeypatch.setattr(cpu_attention, "_TILES", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert not pays(q, k)


def small_model(**settings):
    torch.manual_seed(0)
    config = EtudeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=64, **settings,
    )  # fmt: skip
    model = Etude(config)
    model.rotary.on(torch.device("cpu"))
    ids = torch.randint(0, 256, (4, 65))
    return model, {"ids": ids[:, :-1], "labels": ids[:, 1:]}


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the queries that attend by it."""
    found = []

    def watched(q, k, v):
        found.append(tuple(q.shape))
        return causal_attention(q, k, v)

    monkeypatch.setattr(cpu_attention, "causal_attention", watched)
    assert attention.cpu_attention is cpu_attention
    return found


def test_a_model_attends_by_it_in_training_and_by_nothing_else_with_a_mask_a_cache_or_no_gradient(compiling, calls):
    model, batch = small_model()
    ids = batch["ids"]
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(ids)
        assert calls == [(4, 4, 64, 16)] * 2
        documents = (torch.arange(64) // 20).expand(4, 64)
        model.hidden(ids, documents=documents)  # a mask
        with torch.no_grad():
            model.hidden(ids)
            cache = KVCache(model.config, 4, 64, torch.empty((), dtype=torch.bfloat16))
            model.hidden(ids[:, :40], cache=cache)
            model.hidden(ids[:, 40:50], cache=cache)
            model.hidden(ids[:, 50:51], cache=cache)
    model.hidden(ids)  # fp32
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"gradient_checkpointing": True}])
def test_a_compiled_model_is_as_exact_as_the_plain_one(settings, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_TILES", True)
    checkpointing = settings.pop("gradient_checkpointing", False)
    model, batch = small_model(**settings)
    model.gradient_checkpointing = checkpointing

    def loss_and_gradient(loss, precise):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            result = loss(model, batch)
        (result.sum / result.weight).backward()
        return result.sum.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact_sum, exact = loss_and_gradient(causal_lm_loss, precise=True)
    _, plain = loss_and_gradient(causal_lm_loss, precise=False)
    torch._dynamo.reset()
    compiled = torch.compile(causal_lm_loss, dynamic=False)
    loss_and_gradient(compiled, precise=False)
    with torch.profiler.profile() as profile:
        fast_sum, fast = loss_and_gradient(compiled, precise=False)
    assert sum(event.key == "etude::product_of_bf16" and event.count for event in profile.key_averages()) == 4  # 2 a layer
    assert abs(fast_sum / exact_sum - 1) < 1e-3
    assert (fast - exact).norm() < 1.25 * (plain - exact).norm()
