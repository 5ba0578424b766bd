"""What pretraining does where nothing is said, and what one dial decides."""

import dataclasses
import json

import pytest
import yaml
from test_trainer import asking_to_stop, assert_same, make, no_waiting, one_thread, outcome  # noqa: F401

from etude import cli
from etude.errors import Interrupted, UsageError
from etude.model.config import PRESETS, EtudeConfig
from etude.training import recipe
from etude.training.config import PretrainConfig, SFTConfig
from etude.training.optim import _lr_factor
from etude.weights import save_model

OWN = '{"model_type": "etude", "hidden_size": %s}'


def rates(**settings) -> tuple:
    """Of matrices, queries and keys, embedding, head."""
    config = PretrainConfig(**settings)
    return tuple(config.learning_rate * _lr_factor(kind, config) for kind in ("matrices", "query_key", "embedding", "head"))


def test_the_rates_at_the_batch_they_were_found_for():
    assert rates(batch_size=128, block_size=512) == pytest.approx((9e-3, 3e-3, 0.2, 4e-3))
    assert rates(batch_size=128, block_size=512, tie_word_embeddings=True)[2] == pytest.approx(3e-3)
    assert rates(batch_size=128, block_size=512, optimizer="adamw") == pytest.approx([1.5e-3] * 4)


def test_a_smaller_batch_has_lower_rates_and_a_larger_one_the_same():
    base, half = rates(batch_size=128, block_size=512), rates(batch_size=8, block_size=512)
    assert half == pytest.approx([rate / 2 for rate in base])
    assert rates(batch_size=16, block_size=256) == pytest.approx(half)  # tokens count, not rows
    assert rates(batch_size=1024, block_size=512) == base


def test_a_wider_model_has_lower_rates_and_a_narrower_one_the_same():
    base, half = rates(batch_size=128, block_size=512), rates(batch_size=128, block_size=512, hidden_size=1536)
    assert half == pytest.approx([rate / 2 for rate in base])
    assert rates(batch_size=128, block_size=512, preset="medium") == pytest.approx([rate * 0.75 for rate in base])
    assert rates(batch_size=128, block_size=512, preset="nano") == rates(batch_size=128, block_size=512, hidden_size=96) == base
    assert rates(depth=24, batch_size=128, block_size=512, optimizer="adamw") == pytest.approx([7.5e-4] * 4)
    assert rates(batch_size=128, block_size=512, hidden_size=1536, learning_rate=9e-3) == base  # what is said is done


def test_what_is_said_stays_and_the_others_follow_it():
    assert rates(learning_rate=0.003) == pytest.approx((0.003, 0.001, 0.2 / 3, 0.004 / 3))
    assert rates(learning_rate=0.003, head_learning_rate=0.5, query_key_learning_rate=0.0)[1::2] == pytest.approx((0.0, 0.5))
    assert rates(learning_rate=0.002, initializer="normal") == pytest.approx([0.002] * 4)
    assert rates(batch_size=128, initializer="normal") == pytest.approx([3e-3] * 4)  # small weights want small steps
    assert rates(learning_rate=0.0) == (0.0,) * 4


def test_a_trained_model_is_trained_on_gently():
    assert PretrainConfig(init_from="some/model").optimizer == "adamw"
    for settings in ({}, {"optimizer": "muon"}):
        assert rates(init_from="some/model", **settings) == pytest.approx([3e-4] * 4)
    tuned = SFTConfig(optimizer="muon", learning_rate=1e-3)
    assert all(_lr_factor(kind, tuned) == 1.0 for kind in ("matrices", "query_key", "embedding", "head"))


def test_fine_tuning_suits_the_model_s_width(tiny_model, tmp_path):
    save_model(tiny_model, tmp_path / "ours")
    as_llama = {**json.loads((tmp_path / "ours" / "config.json").read_text()), "model_type": "llama"}
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(as_llama))
    own = SFTConfig(init_from=str(tmp_path / "ours"))
    assert own.optimizer == "adamw" and own.learning_rate == 1.5e-3  # no more than pretraining's, though it is 32 wide
    assert own.filled_in == ("learning_rate",) and not SFTConfig(learning_rate=1e-3).filled_in
    assert SFTConfig(init_from=str(tmp_path / "ours"), learning_rate=0.0).learning_rate == 0.0
    assert SFTConfig(init_from=str(tmp_path / "llama")).learning_rate == 3e-5
    for channels, rate in ((256, 9e-4), (768, 3e-4), (2048, 1.12e-4)):
        (tmp_path / "config.json").write_text(OWN % channels)
        assert SFTConfig(init_from=str(tmp_path)).learning_rate == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model_type": "etude"}', OWN % '"x"', OWN % "null", OWN % ("9" * 400), "[" * 10**5]
)
def test_a_config_that_cannot_be_read_is_left_to_who_loads_it(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert SFTConfig(init_from=str(tmp_path)).learning_rate == SFTConfig(init_from=str(tmp_path / "none")).learning_rate == 3e-5


def test_a_saved_config_says_all_and_is_read_back_the_same(tmp_path):
    config = PretrainConfig(depth=4, block_size=256)
    cli.save(config, str(tmp_path / "run.yaml"))
    saved = yaml.safe_load((tmp_path / "run.yaml").read_text())
    text = (tmp_path / "run.yaml").read_text()
    assert f"learning_rate {config.learning_rate}" in text and f"batch_size {config.batch_size}" in text
    back = ["--config", str(tmp_path / "run.yaml")]
    assert saved["learning_rate"] is None and cli.parse(PretrainConfig, "", back) == config
    # What was not said follows what is said beside it.
    assert cli.parse(PretrainConfig, "", [*back, "--depth", "8"]) == PretrainConfig(depth=8, block_size=256)
    assert cli.parse(PretrainConfig, "", [*back, "--optimizer", "adamw"]) == PretrainConfig(
        depth=4, block_size=256, optimizer="adamw"
    )


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 12, 32])
def test_every_depth_is_a_model(depth):
    config = PretrainConfig(depth=depth)
    shape = EtudeConfig(vocab_size=1000, **config.model_shape(on_accelerator=False))
    assert shape.num_hidden_layers == depth and shape.hidden_size // shape.num_attention_heads == 128
    assert 64 * depth <= shape.hidden_size < 64 * depth + 128
    weights = shape.num_parameters()["matmul"] - 1000 * shape.hidden_size
    tokens = config.max_steps * config.batch_size * config.block_size
    assert 20 * weights <= tokens < 20 * weights + config.batch_size * config.block_size


def test_depth_12_is_the_preset_base():
    assert recipe.shape_of(12) == PRESETS["base"]


def test_the_batch_grows_with_the_run_and_what_is_said_beside_depth_stays():
    sizes = [PretrainConfig(depth=depth).batch_size for depth in (2, 4, 8, 16)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    plain, said = PretrainConfig(depth=8), PretrainConfig(depth=8, batch_size=48)
    assert said.batch_size == 48  # and as many tokens as without
    assert said.max_steps * 48 == pytest.approx(plain.max_steps * plain.batch_size, abs=plain.batch_size)
    assert PretrainConfig(depth=8, max_steps=7).max_steps == 7
    assert PretrainConfig(depth=8, num_attention_heads=8).model_shape(True)["num_attention_heads"] == 8
    assert PretrainConfig(depth=8, epochs=1).max_steps is None and PretrainConfig(depth=8, epochs=1).epochs == 1
    assert (PretrainConfig().batch_size, PretrainConfig().epochs, PretrainConfig().max_steps) == (16, 3.0, None)


def test_long_blocks_make_few_rows_and_not_one_alone():
    tokens = [PretrainConfig(depth=2, block_size=size).batch_size * size for size in (128, 256, 512, 1024, 2048)]
    assert max(tokens) < 1.5 * min(tokens)


@pytest.mark.parametrize(
    "settings", [{"preset": "small"}, {"num_hidden_layers": 3}, {"hidden_size": 128}, {"init_from": "some/model"}]
)
def test_two_answers_to_one_thing_are_refused(settings):
    with pytest.raises(UsageError, match=f"depth and {next(iter(settings))} are two answers to one thing"):
        PretrainConfig(depth=4, **settings)


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match=r"depth \(0\) must be at least 1"):
        PretrainConfig(depth=0)
    with pytest.raises(UsageError, match=r"batch_size \(0\) must be at least 1"):
        PretrainConfig(batch_size=0)
    with pytest.raises(UsageError, match="learning_rate"):
        dataclasses.replace(PretrainConfig(), learning_rate=-1.0)


NEW = {
    "optimizer": "muon", "schedule": "wsd", "final_lr_fraction": 0.0, "momentum_warmup": 5, "initializer": "fan_in",
    "tie_word_embeddings": False,
}  # fmt: skip


def test_a_run_by_the_recipe_goes_on_exactly_and_learns(make, tmp_path):  # noqa: F811
    make("whole", **NEW).run()
    with pytest.raises(Interrupted):
        make("run", loss=asking_to_stop(7), **NEW).run()
    make("run", **NEW).run()
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))
    losses = [record["loss"] for record in outcome(tmp_path / "run")["metrics"] if "loss" in record]
    assert losses[-1] < losses[0]
