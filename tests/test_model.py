"""The model: a Llama to the last digit, that never sees the future and forgets nothing when it is moved or loaded."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from etude.errors import MismatchError, UsageError
from etude.llama import config_to_hf
from etude.model.config import PRESETS, EtudeConfig
from etude.model.rope import rotary_angles
from etude.model.transformer import Etude, document_mask
from etude.weights import build_model, load_model, save_model, to_disk_name

LENGTH = 48


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(**changes) -> EtudeConfig:
    shape = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": LENGTH, "initializer_range": 0.3,
    }  # fmt: skip
    return EtudeConfig(**{**shape, **changes})


def model_of(seed: int = 0, **changes) -> Etude:
    """A model whose norms are not 1, so that a norm left out or put twice would show."""
    torch.manual_seed(seed)
    model = Etude(config_of(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def ids_of(rows: int = 3, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


# --- its config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 0}, r"vocab_size \(0\) must be at least 1"),
        ({"hidden_size": -1}, r"hidden_size \(-1\) must be at least 1"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers \(0\) must be at least 1"),
        ({"num_attention_heads": 0}, r"num_attention_heads \(0\) must be at least 1"),
        ({"max_position_embeddings": 0}, r"max_position_embeddings \(0\) must be at least 1"),
        ({"hidden_size": 30}, r"hidden_size \(30\) must be divisible by num_attention_heads \(4\), or head_dim be given"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be divisible by num_key_value_heads \(3\)"),
        ({"num_key_value_heads": 8}, r"num_attention_heads \(4\) must be divisible by num_key_value_heads \(8\)"),
        ({"num_key_value_heads": 0}, r"num_attention_heads \(4\) must be divisible by num_key_value_heads \(0\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even: rotary embeddings turn pairs of channels"),
        ({"hidden_size": 12}, r"head_dim \(3\) must be even"),
        ({"head_dim": 0}, r"head_dim \(0\) must be even"),
        ({"intermediate_size": 0}, r"intermediate_size \(0\) must be at least 1"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and less than 1"),
        ({"dropout": -0.1}, r"dropout \(-0.1\) must be at least 0 and less than 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps and rope_theta must be greater than 0"),
        ({"rope_theta": -1.0}, "rms_norm_eps and rope_theta must be greater than 0"),
        (
            {"rope_scaling": {"rope_type": "ntk", "factor": 2}},
            r"rope_scaling's rope_type \(ntk\) must be one of linear, llama3, yarn",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type linear lacks factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "llama3 lacks high_freq_factor, low_freq_factor, original_max_position",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "faktor": 3}},
            "rope_scaling of type linear has unknown keys: faktor",
        ),
    ],
)
def test_a_shape_that_cannot_work_is_refused(changes, message):
    with pytest.raises(UsageError, match=message) as error:
        config_of(**changes)
    assert error.value.exit_code == 2


def test_what_is_left_out_follows_from_the_rest():
    config = EtudeConfig(vocab_size=100, hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (6, 16, 256)
    assert EtudeConfig(vocab_size=100, hidden_size=100, num_attention_heads=3, head_dim=20).head_dim == 20
    assert EtudeConfig(vocab_size=100).intermediate_size == 2048
    assert config_of(rope_scaling={"type": "default"}).rope_scaling is None
    scaled = config_of(rope_scaling={"type": "linear", "factor": 2.0, "rope_theta": 1e4})
    assert scaled.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    yarn = config_of(rope_scaling={"rope_type": "yarn", "factor": 2.0}).rope_scaling
    assert yarn["original_max_position_embeddings"] == LENGTH
    assert EtudeConfig.from_dict({**scaled.to_dict(), "model_type": "etude", "torch_dtype": "float32"}) == scaled
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1


SHAPES = {
    "plain": {},
    "multi-head": {"num_key_value_heads": None},
    "one key head": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 20, "rms_norm_eps": 1e-3, "rope_theta": 500.0},
    "qk_norm": {"qk_norm": True, "rms_norm_eps": 1e-3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "head_dim": 32, "rope_theta": 5e5, "max_position_embeddings": 256,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64},
    },
    "yarn": {
        "head_dim": 32, "max_position_embeddings": 256,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "yarn, all options": {
        "head_dim": 32, "max_position_embeddings": 256,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
                         "beta_slow": 2.0, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False},
    },
    "yarn, its own sharpening": {
        "head_dim": 32, "max_position_embeddings": 256,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_right(shape):
    config = config_of(**SHAPES[shape])
    model = Etude(config)
    assert config.num_parameters()["total"] == sum(parameter.numel() for parameter in model.parameters())
    head = 60 * 32
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith(("embed", "lm_head"))
    )
    assert config.num_parameters()["matmul"] == matrices + head
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 48
    assert config.training_flops_per_token(48) == 6 * (matrices + head) + attention


def test_presets_have_the_sizes_they_are_known_by():
    sizes = {name: EtudeConfig(vocab_size=16_384, **shape).num_parameters()["total"] / 1e6 for name, shape in PRESETS.items()}
    assert {name: round(size) for name, size in sizes.items()} == {"nano": 8, "small": 55, "base": 98, "medium": 325}


# --- the same function as Hugging Face's -----------------------------------------------------------------------------


def hf_twin(model: Etude):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_to_hf(model.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    outcome = twin.load_state_dict({to_disk_name(name): tensor for name, tensor in model.state_dict().items()}, strict=False)
    assert not outcome.unexpected_keys
    assert set(outcome.missing_keys) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    return twin


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_are_those_of_hugging_face(shape):
    model = model_of(**SHAPES[shape])
    ids = ids_of(2, model.config.max_position_embeddings)
    assert_close(model(ids), hf_twin(model)(ids).logits, 2e-5)
    assert_close(model.logits(model.hidden(ids)), model(ids), 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_angles_are_those_of_hugging_face(shape):
    config = config_of(**SHAPES[shape])
    twin = hf_twin(model_of(**SHAPES[shape])).model.rotary_emb
    positions = torch.arange(0, 4096, 7)[None]
    reference = twin(torch.zeros(1), positions)
    for ours, theirs in zip(rotary_angles(config, positions), reference, strict=True):
        half = theirs.shape[-1] // 2
        torch.testing.assert_close(ours[..., :half], theirs[..., :half], rtol=1e-6, atol=1e-6)
        assert torch.equal(theirs[..., :half], theirs[..., half:])
    if shape in ("plain", "linear"):
        assert all(
            torch.equal(ours[..., :half], theirs[..., :half])
            for ours, theirs in zip(rotary_angles(config, positions), reference, strict=True)
        )


@torch.no_grad()
def test_the_norm_s_epsilon_is_the_config_s():
    model, other = (model_of(rms_norm_eps=eps) for eps in (1e-5, 1e-1))
    other.load_state_dict(model.state_dict())
    assert (model(ids_of()) - other(ids_of())).abs().max() > 1e-2


# --- what a token may see --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_documents", [False, True])
@torch.no_grad()
def test_no_token_sees_the_future(with_documents):
    model, ids = model_of(), ids_of(1)
    documents = torch.zeros_like(ids) if with_documents else None
    before = model(ids, documents=documents)
    for t in (0, 1, 20, LENGTH - 1):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 60
        after = model(changed, documents=documents)
        assert_close(after[:, :t], before[:, :t], 1e-6) if t else None
        assert ((after - before)[0, t:].abs().amax(dim=-1) > 1e-4).all()  # and each later one sees it


@torch.no_grad()
def test_one_document_is_no_document():
    model, ids = model_of(), ids_of()
    assert_close(model(ids, documents=torch.full_like(ids, 7)), model(ids))
    assert_close(model(ids, positions=torch.arange(LENGTH).expand(3, -1)), model(ids))
    assert_close(model(ids[:, :1]), model(ids)[:, :1])


@torch.no_grad()
def test_documents_in_a_row_do_not_see_each_other():
    model, ids = model_of(), ids_of(2)
    lengths = [[1, 20, 7, 20], [30, 1, 1, 16]]
    documents = torch.stack([torch.repeat_interleave(torch.tensor([5, 3, 9, 4]), torch.tensor(row)) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    packed = model(ids, positions, documents)
    for row in range(2):
        start = 0
        for length in lengths[row]:
            alone = model(ids[row : row + 1, start : start + length])
            assert_close(packed[row : row + 1, start : start + length], alone)
            start += length
    assert (model(ids) - packed)[:, 31:].abs().max() > 0.1


def test_the_document_mask_is_backwards_and_within():
    numbers = torch.tensor([[4, 4, 2, 2, 2], [1, 2, 1, -1, -1]])
    mask = document_mask(numbers)
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bool
    for row in range(2):
        for i in range(5):
            for j in range(5):
                assert mask[row, 0, i, j] == (j <= i and numbers[row, i] == numbers[row, j])


@torch.no_grad()
def test_only_the_distance_between_tokens_counts():
    model = model_of(max_position_embeddings=200).double()
    ids = ids_of(1, 20)
    near, far = (model(ids, positions=torch.arange(first, first + 20)[None]) for first in (0, 150))
    assert_close(far, near, 1e-4)
    stretched = model(ids, positions=2 * torch.arange(20)[None])
    assert (stretched - near).abs().max() > 1e-2


# --- grouped queries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_heads", [1, 2])
@torch.no_grad()
def test_grouped_queries_are_full_attention_with_repeated_heads(key_heads):
    grouped = model_of(num_key_value_heads=key_heads)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = state[name].view(key_heads, 8, 32)  # (G, d, D)
            state[name] = heads.repeat_interleave(4 // key_heads, dim=0).reshape(32, 32)
    full = model_of(num_key_value_heads=4)
    full.load_state_dict(state)
    assert_close(grouped(ids_of()), full(ids_of()))
    assert_close(grouped(ids_of(), documents=ids_of() // 30), full(ids_of(), documents=ids_of() // 30))


@torch.no_grad()
def test_qk_norm_bounds_queries_and_keys():
    model = model_of(qk_norm=True)
    ids, before = ids_of(), model_of(qk_norm=True)(ids_of())
    for layer in model.layers:
        layer.self_attn.q_proj.weight *= 50
        layer.self_attn.k_proj.weight *= 50
    assert_close(model(ids), before, 1e-3)  # as large as they may be, they are normalised
    assert not any("q_norm" in name for name in model_of().state_dict())


# --- moved, saved, loaded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["plain", "untied", "llama3", "yarn"])
@torch.no_grad()
def test_nothing_is_lost_on_the_way_through_meta_device_files_and_moves(tmp_path, shape):
    model = model_of(**SHAPES[shape])
    ids = ids_of(2, model.config.max_position_embeddings)
    wanted = model(ids)
    assert not any("rotary" in name or "inv_freq" in name or "cos" in name for name in model.state_dict())
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training and loaded.config == model.config
    disk = {to_disk_name(name): tensor for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        empty = Etude(model.config).eval()
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    there_and_back = copy.deepcopy(model).double().float()
    halved = copy.deepcopy(model).to(torch.bfloat16)
    halved(ids)
    halved.load_state_dict(model.state_dict())
    halved = halved.float()
    halved.load_state_dict(model.state_dict())
    built = build_model(model.config, disk, "cpu", torch.float32, source="memory")
    for other in (loaded, empty, there_and_back, halved, built):
        assert not any(tensor.is_meta for tensor in [*other.parameters(), *other.buffers()])
        assert torch.equal(other(ids), wanted)


def test_a_model_first_used_in_inference_can_be_trained():
    model = model_of()
    with torch.inference_mode():
        model(ids_of())
    model.train()
    model(ids_of()).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_models_do_not_share_their_tables():
    first = model_of()
    wanted = first(ids_of())
    second = model_of(rope_theta=50.0)
    assert (second(ids_of()) - wanted).abs().max() > 1e-2
    assert torch.equal(first(ids_of()), wanted)


def assert_tied(model: Etude) -> None:
    """The head is the embedding: the same tensor, counted once, and a change of one is a change of the other."""
    assert model.head_weight is model.embed_tokens.weight
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    hidden = torch.ones(1, 32, dtype=model.head_weight.dtype)
    before = model.logits(hidden).detach().clone()
    with torch.no_grad():
        model.embed_tokens.weight[7] += 1
    changed = (model.logits(hidden) - before).abs()[0] > 1e-3
    assert changed.nonzero().flatten().tolist() == [7]


def test_a_tied_head_stays_tied(tmp_path):
    model = model_of()
    save_model(model, tmp_path)
    assert_tied(copy.deepcopy(model))
    assert_tied(model_of().to(torch.float64))
    assert_tied(copy.deepcopy(model).to("cpu").float())
    assert_tied(load_model(tmp_path))
    assert_tied(load_model(tmp_path, dtype=torch.bfloat16).float())
    fresh = Etude(model.config)
    fresh.load_state_dict(model.state_dict())
    assert_tied(fresh)
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert_tied(fresh)
    assert_tied(
        build_model(model.config, {to_disk_name(n): t for n, t in model.state_dict().items()}, "cpu", torch.float32, "memory")
    )


def test_a_tied_head_is_trained_from_both_sides():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(torch.tensor([[1, 2]]))
    F.cross_entropy(logits[0], torch.tensor([2, 30])).backward()
    assert model.embed_tokens.weight.grad[1].abs().max() > 0  # read, never a label
    assert model.embed_tokens.weight.grad[30].abs().max() > 0  # a label, never read
    optimizer.step()
    assert_tied(model)


def test_an_untied_head_is_one_of_its_own(tmp_path):
    model = model_of(tie_word_embeddings=False)
    save_model(model, tmp_path)
    for other in (model, load_model(tmp_path), copy.deepcopy(model).double()):
        assert other.head_weight is other.lm_head.weight is not other.embed_tokens.weight
        assert (other.lm_head.weight != other.embed_tokens.weight).any()


def test_weights_that_do_not_fit_are_refused():
    model = model_of()
    tensors = {to_disk_name(name): tensor for name, tensor in model.state_dict().items()}
    for change, message in [
        (
            lambda t: t.pop("model.norm.weight"),
            r"1 weights do not fit config.json \(norm.weight: expected \(32,\), found None\)",
        ),
        (lambda t: t.update({"model.extra": torch.zeros(2)}), r"extra: expected None, found \(2,\)"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(60, 32)}), "lm_head.weight: expected None"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"norm.weight: expected \(32,\), found \(31,\)"),
    ]:
        changed = dict(tensors)
        change(changed)
        with pytest.raises(MismatchError, match=message):
            build_model(model.config, changed, "cpu", torch.float32, source="memory")


# --- training --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dropout_drops_in_training_only():
    model = model_of(dropout=0.5)
    wanted = model_of()(ids_of())
    assert torch.equal(model(ids_of()), wanted)  # evaluating, there is none
    model.train()
    torch.manual_seed(1)
    first, second = model(ids_of()), model(ids_of())
    assert (first - wanted).abs().max() > 0.1 and (first - second).abs().max() > 0.1
    torch.manual_seed(1)
    assert torch.equal(model(ids_of()), first)  # a function of the seed
    assert torch.equal(model_of().train()(ids_of()), wanted)


@torch.no_grad()
def test_dropout_is_after_the_embedding_and_on_each_residual_branch(monkeypatch):
    dropped = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace=False: dropped.append((tuple(x.shape), p, training)) or x)
    model_of(dropout=0.25, num_hidden_layers=3).train()(ids_of())
    assert dropped == [((3, LENGTH, 32), 0.25, True)] * (1 + 2 * 3)


def test_a_loaded_model_is_ready_to_answer(tmp_path):
    save_model(model_of(dropout=0.5).train(), tmp_path)
    assert not load_model(tmp_path).training


def test_initial_weights_have_the_spread_asked_for():
    torch.manual_seed(0)
    model = Etude(
        EtudeConfig(vocab_size=500, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, tie_word_embeddings=False)
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert (parameter == 1).all()
        else:
            wanted = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # sqrt(2 · 8 layers)
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05) and abs(parameter.mean().item()) < wanted / 10
    assert model.embed_tokens.weight.shape == (500, 128)


def test_every_weight_takes_part():
    for shape in SHAPES.values():
        model = model_of(**shape)
        model(ids_of()).square().mean().backward()
        unused = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
        assert not unused


@pytest.mark.parametrize("tied", [True, False])
def test_fan_in_keeps_what_enters_a_layer_its_size_and_lets_no_layer_write_yet(tied):
    torch.manual_seed(0)
    model = Etude(EtudeConfig(
        vocab_size=500, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, tie_word_embeddings=tied,
        qk_norm=True,
    ))  # fmt: skip
    model.init_weights_by_fan_in()
    for name, weight in model.named_parameters():
        part = name.split(".")[-2]
        std = {"o_proj": 0.0, "down_proj": 0.0, "lm_head": 0.0, "embed_tokens": 0.02 if tied else 1.0}.get(part, 1 / 16)
        if weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            assert weight.std().item() == pytest.approx(std, rel=0.02), name
    ids = torch.arange(20)[None]
    assert torch.equal(model.hidden(ids), model.norm(model.embed_tokens(ids)))


FIRST_CALLS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sizes = {}

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__.rstrip("_")
        if isinstance(arguments[0] if arguments else None, torch.Tensor):
            sizes.setdefault(name, arguments[0].numel())
        return function(*arguments, **(keywords or {}))

with Watch():
    from etude.losses import causal_lm_loss
    from etude.model.config import EtudeConfig
    from etude.model.transformer import Etude

    model = Etude(EtudeConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64))
    ids = torch.arange(64)[None]
    causal_lm_loss(model, {"ids": ids, "labels": ids}).sum.backward()
print({name: sizes[name] for name in ("cos", "sin", "exp")})
"""


def test_elementary_functions_are_called_by_one_thread_before_many_ask():
    """MKL may otherwise give a thread a kernel of low accuracy, in one process of some twenty."""
    told = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert told.strip() == "{'cos': 1, 'sin': 1, 'exp': 1}"
