"""Products of 8 bits: against fp64, against the same product of 16 bits, and where there are to be none."""

import pytest
import torch
import torch.nn.functional as F
from test_trainer import make, no_waiting  # noqa: F401

from etude.device import pick_precision
from etude.errors import MismatchError, UsageError
from etude.losses import IGNORED, causal_lm_loss, linear_cross_entropy
from etude.model import linear
from etude.model.config import EtudeConfig
from etude.model.linear import LARGEST, Linear, product, rounded, rounded_by_one_scale
from etude.model.transformer import Etude
from etude.training.compiler import LongRowsAreHeld, hold_long_rows


def cpu_multiplies_rows() -> bool:
    try:
        product(rounded(torch.ones(16, 16)), rounded(torch.ones(16, 16)), torch.bfloat16)
    except RuntimeError:  # before torch 2.13 by one scale only
        return False
    return True


pytestmark = pytest.mark.skipif(not cpu_multiplies_rows(), reason="this torch has no such products on a CPU")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restored(matrix: linear.Rounded) -> torch.Tensor:
    """What a rounded matrix stands for, in fp64."""
    elements, scale = matrix
    return elements.double() * scale.double()


def test_each_element_is_as_near_as_three_bits_after_the_first_bring_it():
    rows = normal(64, 256) * torch.logspace(-6, 6, 64)[:, None]  # of very different sizes
    wide = rows.double()
    found = restored(rounded(rows))
    smallest = wide.abs().amax(-1, keepdim=True) / LARGEST * 2**-6  # below that the format has fewer bits
    assert ((found - wide).abs() <= wide.abs().clamp(min=smallest) * 2**-4 * 1.0001).all()
    assert torch.allclose(found.abs().amax(-1), wide.abs().amax(-1), rtol=1e-6)  # the largest of a row loses nothing


def test_zeros_stay_zeros_and_what_is_not_a_number_stays_seen():
    rows = torch.zeros(3, 16)
    assert torch.equal(restored(rounded(rows)), rows.double())
    rows[1, 3] = torch.nan
    assert restored(rounded(rows))[1].isnan().any() and not restored(rounded(rows))[0].isnan().any()
    rows[1, 3] = torch.inf
    assert not restored(rounded(rows))[1].isfinite().all()


@pytest.mark.parametrize("by", [rounded, rounded_by_one_scale])
@pytest.mark.parametrize("long_sums", [False, True])
def test_a_product_is_that_of_what_was_rounded(by, long_sums):
    a, b = by(normal(48, 64)), by(normal(32, 64, seed=1))
    wanted = restored(a) @ restored(b).t()
    found = product(a, b, torch.bfloat16, long_sums)
    assert found.shape == (48, 32) and found.dtype == torch.bfloat16
    assert (found.double() - wanted).norm() < 4e-3 * wanted.norm()


def test_a_bound_that_is_known_needs_no_look():
    probabilities = normal(8, 64).softmax(-1)
    elements, scale = rounded_by_one_scale(probabilities, largest=1.0)
    assert scale.item() == pytest.approx(1 / LARGEST) and elements.float().max() <= LARGEST
    assert ((restored((elements, scale)) - probabilities.double()).norm() / probabilities.norm()).item() < 0.04


def layer() -> tuple[Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    made = Linear(64, 96)
    made.fp8 = True
    return made.train(), normal(2, 24, 64).requires_grad_(), normal(2, 24, 96, seed=1)


def test_a_layer_and_its_gradients():
    made, x, gradient = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    y.backward(gradient.bfloat16())
    rows, weight, g = x.detach().flatten(0, 1), made.weight.detach(), gradient.flatten(0, 1).bfloat16()
    wanted = restored(rounded(rows.bfloat16())) @ restored(rounded(weight)).t()
    assert y.dtype == torch.bfloat16 and (y.flatten(0, 1).double() - wanted).norm() < 4e-3 * wanted.norm()
    by_x = restored(rounded(g)) @ restored(rounded(weight.t())).t()
    assert (x.grad.flatten(0, 1).double() - by_x).norm() < 5e-3 * by_x.norm()
    by_weight = g.double().t() @ rows.bfloat16().double()  # in 16 bits
    assert made.weight.grad.dtype == torch.float32
    assert (made.weight.grad.double() - by_weight).norm() < 4e-3 * by_weight.norm()


def test_who_does_not_train_computes_with_the_weights_as_they_are():
    made, x, _ = layer()
    plain = F.linear(x, made.weight)
    assert not torch.equal(made(x), plain)
    with torch.no_grad():
        assert torch.equal(made(x), plain)
    assert torch.equal(made.eval()(x), plain)
    made.train().fp8 = False
    assert torch.equal(made(x), plain)


def test_small_and_odd_matrices_are_left_alone(monkeypatch):
    made, x, _ = layer()
    monkeypatch.setattr(linear, "SMALLEST", 96 * 64 + 1)
    assert torch.equal(made(x), F.linear(x, made.weight))
    monkeypatch.setattr(linear, "SMALLEST", 1)
    odd = Linear(64, 90).train()
    odd.fp8 = True
    assert torch.equal(odd(x), F.linear(x, odd.weight))


@pytest.mark.parametrize("chunk", [2**22, 20 * 128])
def test_the_loss_and_its_gradients(monkeypatch, chunk):
    """Rounding changes them by some hundredths of their size; a wrong scale, or a chunk left out, by much more."""
    monkeypatch.setattr("etude.losses.CHUNK_LOGITS_CPU", chunk)
    labels = torch.randint(0, 128, (50,), generator=torch.Generator().manual_seed(2))
    labels[::7] = IGNORED
    results = []
    for dtype, fp8 in ((torch.float64, False), (torch.bfloat16, True)):
        hidden, weight = (normal(rows, 64, seed=rows).to(dtype).requires_grad_() for rows in (50, 128))
        loss = linear_cross_entropy(hidden, weight, labels, fp8)
        loss.backward()
        results.append((loss.item(), hidden.grad.double(), weight.grad.double()))
    (wanted, *wanted_gradients), (found, *gradients) = results
    assert found == pytest.approx(wanted, rel=2e-2)
    for one, other in zip(gradients, wanted_gradients, strict=True):
        assert 1e-3 < (one - other).norm() / other.norm() < 0.25  # logits of size 8 are off by 0.3
    assert not gradients[0][labels == IGNORED].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_trains_nearly_as_in_16_bits_and_evaluates_just_so(compiled):
    torch.manual_seed(0)
    shape = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
    model = Etude(EtudeConfig(**shape, tie_word_embeddings=False)).train()
    names = list(model.state_dict())
    ids = torch.randint(0, 256, (4, 33))
    batch = {"ids": ids[:, :-1], "labels": ids[:, 1:]}
    found = {}
    for fp8 in (False, True):
        model.fp8 = fp8
        assert all(module.fp8 == fp8 for module in model.modules() if isinstance(module, Linear))
        torch._dynamo.reset()
        loss = torch.compile(causal_lm_loss, dynamic=False) if compiled else causal_lm_loss
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model, batch).sum
            value.backward()
            with torch.no_grad():
                evaluated = causal_lm_loss(model.eval(), batch).sum
        model.train()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found[fp8] = (value.item(), gradient, evaluated.item())
    assert found[True][0] == pytest.approx(found[False][0], rel=5e-3) and found[True][0] != found[False][0]
    assert 1e-3 < ((found[True][1] - found[False][1]).norm() / found[False][1].norm()).item() < 0.2
    assert found[True][2] == found[False][2] and list(model.state_dict()) == names


def test_a_device_that_cannot_is_named():
    with pytest.raises(UsageError, match=r"precision \(fp8\) needs a GPU that multiplies 8 bits"):
        pick_precision("fp8", torch.device("cpu"), training=True)


def test_nobody_but_training_is_offered_it():
    with pytest.raises(UsageError, match=r"precision \(fp8\) must be auto, bf16, fp16, fp32"):
        pick_precision("fp8", torch.device("cpu"))


@pytest.fixture
def rows_held():
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    before = config.inductor_choices_class
    hold_long_rows()
    torch._dynamo.reset()
    yield V.choices
    config.inductor_choices_class = before
    V.set_choices_handler(InductorChoices())
    torch._dynamo.reset()


def test_code_compiled_with_rows_held_gives_the_same(rows_held):
    def centred(x: torch.Tensor) -> torch.Tensor:
        return (x - x.amax(-1, keepdim=True)).exp().sum(-1)

    x = normal(8, 2048)
    assert isinstance(rows_held, LongRowsAreHeld)
    assert torch.allclose(torch.compile(centred)(x), centred(x))


@pytest.mark.parametrize("hint, size, together, held", [
    ("INNER", 2**14, False, True), ("INNER", 2**14 + 1, False, False), ("INNER", 16, False, True),
    ("OUTER", 2**14, False, False), ("INNER", 2**14, True, False),
])  # fmt: skip
def test_which_rows_are_held(rows_held, hint, size, together, held, monkeypatch):
    """Asked as the compiler asks; what it would hold by itself it holds."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Features:
        reduction_numel = size

        def get_reduction_hint(self) -> ReductionHint:
            return ReductionHint[hint]

    class Graph:
        class sizevars:
            statically_known_leq = staticmethod(lambda left, right: left <= right)

    own = staticmethod(lambda features, together: features.reduction_numel <= 1024 and not together)
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", own)
    with V.set_graph_handler(Graph()):
        assert rows_held.should_use_persistent_reduction(Features(), together) == held


def allow_fp8(monkeypatch) -> None:
    """On a CPU, and for matrices of any size."""
    monkeypatch.setattr(linear, "SMALLEST", 1)
    for module in ("start", "trainer"):
        monkeypatch.setattr(f"etude.training.{module}.pick_precision", lambda name, device, training: name)


def test_a_trainer_of_8_bits(make, monkeypatch, capsys):  # noqa: F811
    """As on a GPU, but on a CPU: the flags, what the compiler is asked, the header, and training that learns something else."""
    asked = []
    monkeypatch.setattr("etude.training.compiler.hold_long_rows", lambda: asked.append(True))
    plain = make("plain", precision="bf16")
    plain.run()
    allow_fp8(monkeypatch)
    trainer = make("run", precision="fp8")
    assert trainer.model.fp8 and not asked
    trainer.run()
    assert "fp8 in 15 of 15 products" in capsys.readouterr().out  # seven of each layer, and the head's
    pairs = zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    assert 0 < sum((a - b).norm() for a, b in pairs) < sum(a.norm() for a in plain.model.parameters())
    make("compiled", precision="fp8", compile="on")
    assert asked
    with pytest.raises(MismatchError, match="precision fp8 → bf16"):
        make("run", precision="bf16", max_steps=20).run()
