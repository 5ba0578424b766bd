"""What a stage starts from: its own tokenizer, another model's weights, a published Llama's."""

import dataclasses

import pytest
import torch

from etude.errors import MismatchError, UsageError
from etude.export import export_llama
from etude.tokenizer import train_tokenizer
from etude.training.config import PretrainConfig, SFTConfig
from etude.training.start import pretraining_model, pretraining_tokenizer, starting_model, weights_fingerprint
from etude.weights import save_model


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):
    save_model(tiny_model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def config(**settings) -> PretrainConfig:
    return PretrainConfig(**{"block_size": 32, "device": "cpu", **settings})


def test_training_on_keeps_the_model_s_tokenizer_and_shape(folder, tiny_model, tokenizer):
    """With the default tokenizer its ids would mean something else, and nothing would say so."""
    settings = config(init_from=str(folder))
    found = pretraining_tokenizer(settings)
    assert found.vocabulary == tokenizer.vocabulary
    model = pretraining_model(settings, found)
    assert model.config == tiny_model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model.parameters(), strict=True))


def test_another_vocabulary_is_refused(folder, tmp_path):
    train_tokenizer(
        ["Quite other words, from somewhere else altogether: 完全不同的词。"] * 9, tmp_path / "other", vocab_size=280
    )
    with pytest.raises(MismatchError, match="leave out --tokenizer"):
        pretraining_tokenizer(config(init_from=str(folder), tokenizer=str(tmp_path / "other")))


def test_a_shape_beside_init_from_is_refused(folder, tokenizer):
    with pytest.raises(UsageError, match="leave out --hidden_size"):
        pretraining_model(config(init_from=str(folder), hidden_size=48), tokenizer)


def test_a_shape_that_is_the_model_s_own_may_stand_beside_init_from(folder, tiny_model, tokenizer):
    """A run.yaml written when tied heads were the default says so."""
    assert tiny_model.config.tie_word_embeddings and not config().tie_word_embeddings
    model = pretraining_model(config(init_from=str(folder), tie_word_embeddings=True), tokenizer)
    assert model.config == tiny_model.config


@pytest.mark.parametrize("make", [pretraining_model, lambda config, _tokenizer: starting_model(config, before="train")])
def test_a_machine_that_cannot_is_told_before_the_data_is_read(folder, tokenizer, make):
    kind = PretrainConfig if make is pretraining_model else SFTConfig
    for wrong, told in (({"precision": "fp8"}, "fp8"), ({"precision": "fp16"}, "fp16"), ({"device": "cuda:99"}, "cuda:99")):
        with pytest.raises(UsageError, match=told):
            make(kind(**{"block_size": 32, "device": "cpu", "init_from": str(folder), **wrong}), tokenizer)


def test_a_block_longer_than_the_context_is_refused(folder, tokenizer):
    with pytest.raises(UsageError, match="lower --block_size"):
        pretraining_model(config(init_from=str(folder), block_size=65), tokenizer)


def test_both_stages_start_from_a_llama_folder(folder, tiny_model, tmp_path):
    export_llama(folder, tmp_path / "llama")
    llama = str(tmp_path / "llama")
    model = pretraining_model(config(init_from=llama), pretraining_tokenizer(config(init_from=llama)))
    chat_model, tokenizer = starting_model(SFTConfig(init_from=llama, block_size=32, dropout=0.1), before="train")
    assert chat_model.config.dropout == 0.1 and tokenizer.eos_id == tiny_model.config.eos_token_id
    for other in (model, chat_model):
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), tiny_model.parameters(), strict=True))


def test_no_model_to_start_from_names_the_command(tmp_path):
    with pytest.raises(MismatchError, match=r"run: python train/train_pretrain\.py"):
        starting_model(SFTConfig(init_from=str(tmp_path)), before="python train/train_pretrain.py")


def test_the_fingerprint_follows_the_weights(folder, tiny_model):
    before = weights_fingerprint(str(folder))
    assert before == weights_fingerprint(str(folder)) and weights_fingerprint("") == ""
    with torch.no_grad():
        tiny_model.norm.weight += 1
    save_model(tiny_model, folder)
    assert weights_fingerprint(str(folder)) != before


@pytest.mark.parametrize(
    "bad",
    [{"beta1": 1.5}, {"epochs": float("inf")}, {"epochs": float("nan")}, {"seed": 2**64}, {"epsilon": 0.0}, {"momentum": -0.1}],
)
def test_numbers_that_cannot_work_are_refused_before_anything_starts(bad):
    (name,) = bad
    with pytest.raises(UsageError, match=name):
        dataclasses.replace(config(), **bad)


@pytest.mark.parametrize("factor", [0, "two", None, True])
def test_rope_scaling_must_be_numbers(factor):
    from etude.model.config import EtudeConfig

    with pytest.raises(UsageError, match="factor"):
        EtudeConfig(vocab_size=10, rope_scaling={"rope_type": "linear", "factor": factor})
