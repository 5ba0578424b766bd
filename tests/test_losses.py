"""The loss: that of Hugging Face, the same however a batch is cut, a mean over tokens and never over batches."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from etude import losses
from etude.data.batches import Batches, as_tensors
from etude.errors import VerificationError
from etude.evaluation import LossResult, evaluate_loss
from etude.llama import config_to_hf
from etude.losses import IGNORED, causal_lm_loss, linear_cross_entropy
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.training.config import PretrainConfig
from etude.training.trainer import Trainer
from etude.weights import to_disk_name

CPU = torch.device("cpu")
ROWS, LENGTH = 7, 10
SUPERVISED = (1, 10, 0, 3, 7, 0, 2)  # labels that count, row by row: as uneven as data has it


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request) -> Etude:
    torch.manual_seed(0)
    return Etude(EtudeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=LENGTH, initializer_range=0.3, tie_word_embeddings=request.param,
    )).double()  # fmt: skip


class Rows:
    """Samples of random ids, ``supervised[row]`` of each row's labels left to learn."""

    block_size = LENGTH

    def __init__(self, supervised=SUPERVISED, seed: int = 0):
        source = np.random.default_rng(seed)
        ids = source.integers(0, 50, (len(supervised), LENGTH + 1))
        order = source.permuted(np.tile(np.arange(LENGTH), (len(supervised), 1)), axis=1)
        self.ids, self.labels = ids[:, :-1], np.where(order < np.array(supervised)[:, None], ids[:, 1:], IGNORED)

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, numbers) -> dict[str, np.ndarray]:
        return {"ids": self.ids[list(numbers)], "labels": self.labels[list(numbers)]}

    def describe(self, number: int) -> str:
        return f"row {number}"

    def whole(self) -> dict[str, torch.Tensor]:
        return as_tensors(self.load(range(len(self))))


def reference_loss(model: Etude, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over supervised tokens, by the plainest means."""
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def gradients(model: Etude, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    for ours, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance * reference.abs().max().item())


# --- through the trainer ---------------------------------------------------------------------------------------------


@pytest.fixture
def trainer_of(model, tokenizer, tmp_path):
    """``trainer_of(samples, micro_batch_size)`` and the list into which its optimizer puts the gradients it is given."""

    def trainer_of(samples: Rows, micro_batch_size: int | None) -> tuple[Trainer, list[list[torch.Tensor]]]:
        config = PretrainConfig(
            data=("rows",), output=str(tmp_path / "run"), tokenizer="", block_size=LENGTH, batch_size=len(samples),
            micro_batch_size=micro_batch_size, max_steps=2, max_grad_norm=0, device="cpu", precision="fp32", optimizer="adamw",
        )  # fmt: skip
        trainer = Trainer(config, model, tokenizer, batches=Batches(samples, len(samples), seed=0), loss=causal_lm_loss)
        given: list[list[torch.Tensor]] = []
        (optimizer,) = trainer.optimizers
        optimizer.step = lambda: given.append([parameter.grad.clone() for parameter in model.parameters()])
        return trainer, given

    return trainer_of


def test_any_split_into_micro_batches_gives_the_same_gradient(model, trainer_of):
    rows = Rows()
    batch = rows.whole()
    mean = reference_loss(model, batch)
    wanted, whole = gradients(model, mean), None
    for size in (None, ROWS, *range(1, ROWS), 100):
        trainer, given = trainer_of(rows, size)
        metrics = trainer.optimizer_step(batch)
        whole = whole or given[0]
        assert_equal(given[0], whole, 1e-10)
        assert_equal(given[0], wanted, 1e-6)  # the one factor that all share is in fp32
        assert float(metrics["loss"]) == pytest.approx(mean.item(), rel=1e-6)  # of all micro-batches, not of the last
        assert int(metrics["supervised_tokens"]) == sum(SUPERVISED)
        norm = torch.stack([gradient.norm() for gradient in wanted]).norm().item()
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("size", [7, 3])
def test_no_gradient_is_left_over_from_the_step_before(model, trainer_of, size):
    first, second = Rows().whole(), Rows(seed=1).whole()
    trainer, given = trainer_of(Rows(), size)
    trainer.optimizer_step(first)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    trainer.optimizer_step(second)
    assert_equal(given[1], gradients(model, reference_loss(model, second)), 1e-6)


def test_micro_batches_without_a_supervised_token_change_nothing(model, trainer_of):
    rows, padded = Rows(), Rows((*SUPERVISED, 0, 0, 0))
    padded.ids[:ROWS], padded.labels[:ROWS] = rows.ids, rows.labels
    trainer, given = trainer_of(padded, 1)
    trainer.optimizer_step(padded.whole())
    assert_equal(given[0], gradients(model, reference_loss(model, rows.whole())), 1e-6)


def test_a_batch_with_nothing_to_learn_is_refused_and_touches_no_weight(model, tokenizer, trainer_of):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer, given = trainer_of(Rows((0,) * ROWS), 2)
    with pytest.raises(VerificationError, match=r"step 1: no supervised token; .*row \d") as error:
        trainer.optimizer_step(trainer.batches.at(0))
    assert error.value.exit_code == 70 and not given
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- the loss itself -------------------------------------------------------------------------------------------------


def test_a_loss_is_a_sum_and_its_weight(model):
    batch = Rows().whole()
    loss = causal_lm_loss(model, batch)
    assert int(loss.weight) == sum(SUPERVISED) and loss.sum.dtype == torch.float64
    torch.testing.assert_close(loss.sum / loss.weight, reference_loss(model, batch), rtol=1e-12, atol=0)
    assert_equal(gradients(model, loss.sum / loss.weight), gradients(model, reference_loss(model, batch)), 1e-10)


def test_nothing_to_learn_is_a_sum_of_zero_and_no_nan(model):
    loss = causal_lm_loss(model, Rows((0, 0)).whole())
    assert loss.sum.item() == 0 and int(loss.weight) == 0
    assert all((gradient == 0).all() for gradient in gradients(model, loss.sum))


def test_the_loss_and_its_gradient_are_those_of_hugging_face(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaForCausalLM(LlamaConfig(**config_to_hf(model.config))).double()
    state = {to_disk_name(name): tensor for name, tensor in model.state_dict().items()}
    missing = hf.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    rows = Rows()
    sequence = np.concatenate([rows.ids[:, :1], np.where(rows.labels == IGNORED, rows.ids[:, [0]], rows.labels)], axis=1)
    sequence[:, 1:-1] = rows.ids[:, 1:]
    labels = np.concatenate([np.full((ROWS, 1), IGNORED), rows.labels], axis=1)  # not yet shifted: they do so themselves
    reference = hf(torch.from_numpy(sequence), labels=torch.from_numpy(labels)).loss
    loss = causal_lm_loss(model, rows.whole())
    mean = loss.sum / loss.weight
    assert mean.item() == pytest.approx(reference.item(), rel=1e-5)
    theirs = torch.autograd.grad(reference, [hf.get_parameter(to_disk_name(name)) for name, _ in model.named_parameters()])
    assert_equal(gradients(model, mean), list(theirs), 1e-4)


@pytest.mark.parametrize("budget", [1, 120, 10**9], ids=["one by one", "three at once", "all at once"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_loss_without_all_logits_is_cross_entropy(monkeypatch, budget, dtype, tolerance):
    monkeypatch.setattr(losses, "CHUNK_LOGITS_CPU", budget)
    torch.manual_seed(0)
    for labels in (
        torch.randint(0, 40, (11,)),
        torch.tensor([IGNORED] * 4 + [3, 39, 0] + [IGNORED] * 4),
        torch.full((11,), IGNORED),
    ):
        hidden = (torch.randn(11, 8, dtype=dtype) * 3).requires_grad_()
        weight = torch.randn(40, 8, dtype=dtype, requires_grad=True)
        ours = linear_cross_entropy(hidden, weight, labels)
        reference = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction="sum")
        assert ours.dtype == reference.dtype == dtype
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
        for inputs in ([hidden, weight], [hidden], [weight]):
            found = torch.autograd.grad(ours * 0.37, inputs, retain_graph=True)  # a factor from outside reaches both
            wanted = torch.autograd.grad(reference * 0.37, inputs, retain_graph=True)
            assert_equal(list(found), list(wanted), tolerance)
        with torch.no_grad():
            torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), ours.detach(), rtol=0, atol=0)


def test_large_logits_do_not_overflow():
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([0])).item() == 0
    assert linear_cross_entropy(hidden, weight, torch.tensor([1])).item() == 2000


def test_frozen_parts_get_no_gradient():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2])).backward()
    assert hidden.grad is not None and weight.grad is None


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_perplexity_is_of_tokens_and_does_not_depend_on_the_batch_size(model):
    rows = Rows()
    with torch.no_grad():
        mean = reference_loss(model, rows.whole()).item()
        of_rows = [reference_loss(model, as_tensors(rows.load([row]))).item() for row in range(ROWS)]
    for batch_size in (1, 2, 3, ROWS, 50):
        result = evaluate_loss(model, rows, CPU, batch_size=batch_size)
        assert result.tokens == sum(SUPERVISED)
        assert result.loss == pytest.approx(mean, rel=1e-10)
        assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-9)
    mean_of_rows = np.nanmean(of_rows)
    assert abs(mean_of_rows - mean) > 0.05  # what an average over batches would give is not it


def test_evaluation_takes_evenly_spaced_samples_up_to_its_limit(model):
    taken = []

    class Watched(Rows):
        def load(self, numbers):
            taken.extend(numbers)
            return super().load(numbers)

    for limit, wanted in [(0, 7), (1, 1), (LENGTH, 1), (3 * LENGTH + 5, 3), (70, 7), (10**9, 7)]:
        taken.clear()
        evaluate_loss(model, Watched(), CPU, batch_size=2, max_tokens=limit)
        assert len(taken) == wanted == len(set(taken)) and taken == sorted(taken)
        gaps = np.diff([*taken, ROWS])
        assert taken[0] == 0 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_nothing_about_the_model(model, training):
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss(model, batch):
        assert not model.training and not torch.is_grad_enabled()  # no dropout, and nothing kept for a backward pass
        return causal_lm_loss(model, batch)

    result = evaluate_loss(model, Rows(), CPU, loss=loss)
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError):
        evaluate_loss(model, Rows(), CPU, loss=lambda model, batch: 1 // 0)
    assert model.training is training and result.loss > 0


def test_means_are_taken_of_sums():
    result = LossResult(nats=20.0, tokens=8)
    assert (result.loss, result.perplexity) == (2.5, math.exp(2.5))
    assert result.bits_per_byte(10) == pytest.approx(20 / math.log(2) / 10)
    assert LossResult(1e9, 1).perplexity < math.inf
    assert math.isnan(LossResult(0.0, 0).loss) and math.isnan(result.bits_per_byte(0))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_memory_and_not_the_gradient(model, dropout):
    model = Etude(dataclasses.replace(model.config, dropout=dropout)).double()
    batch, kept = Rows().whole(), []

    def gradient(checkpointing: bool) -> list[torch.Tensor]:
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(0)
        held = 0

        def pack(tensor):
            nonlocal held
            held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = causal_lm_loss(model, batch)
        kept.append(held)
        return gradients(model, loss.sum)

    assert_equal(gradient(True), gradient(False), 1e-12)
    assert kept[0] < kept[1] / 2
