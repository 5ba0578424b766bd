"""The benchmarks refuse what is wrong before they time it, and count what they say they count."""

import dataclasses
import json

import pytest
import torch

from etude import losses
from etude.benchmark import data, decode, report, sft, speedrun, train
from etude.benchmark.data import DataBenchmark
from etude.benchmark.decode import DecodeBenchmark
from etude.benchmark.report import in_turns, mfu_of, peaks_of
from etude.benchmark.sft import SFTBenchmark
from etude.benchmark.speedrun import SpeedrunBenchmark
from etude.benchmark.train import TrainBenchmark
from etude.data.sft import SFTRows
from etude.errors import UsageError, VerificationError
from etude.generation import plain
from etude.losses import IGNORED
from etude.model.attention import KVCache
from etude.model.transformer import Etude
from etude.weights import save_model

DECODING = {
    "preset": "nano", "num_hidden_layers": 2, "vocab_size": 256, "prompt_tokens": 6, "new_tokens": 8, "batch_sizes": (1, 3),
    "device": "cpu", "rounds": 1,
}  # fmt: skip


@pytest.fixture
def tuning(chat_file, tokenizer_folder) -> SFTBenchmark:
    return SFTBenchmark(
        data=(str(chat_file),), tokenizer=str(tokenizer_folder), preset="nano", num_hidden_layers=1, block_size=128,
        batch_size=4, device="cpu", precision="fp32", compile="off", rounds=1, steps=2,
    )  # fmt: skip


@pytest.fixture
def rows(tuning, tmp_path) -> tuple:
    store, tokenizer = sft.prepare(tuning, tmp_path)
    return sft.packed_rows(tuning, store, tokenizer), sft.padded_rows(tuning, store, tokenizer)


def test_all_take_turns():
    order = []
    found = in_turns({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, rounds=2)
    assert order == ["a", "b", "a", "b"] and found == {"a": [1, 3], "b": [2, 4]}


def test_mfu_is_the_share_of_what_a_large_product_reaches(monkeypatch):
    asked = []
    monkeypatch.setattr(report, "matmul_ceiling", lambda *given: asked.append(given) or 8e12)
    figures = mfu_of(2e12, torch.device("cpu"), "fp16")
    assert figures == {"etude TFLOP/s": 2.0, "matmul TFLOP/s": 8.0, "MFU of that": 0.25}
    assert asked == [(torch.device("cpu"), "fp16")]


def test_a_gpu_tells_the_memory_of_each_and_a_cpu_of_all():
    assert peaks_of({"etude": 2**30, "peer": 2**31}, 2**29) == {"etude peak GiB": 1.5, "peer peak GiB": 2.5}
    ((name, all_of_it),) = peaks_of({"etude": None, "peer": None}, 2**29).items()
    assert "all" in name and 0.05 < all_of_it < 1000


# ---- train, data --------------------------------------------------------------------------------------------------------

STEPS = TrainBenchmark(
    preset="nano", num_hidden_layers=1, vocab_size=64, block_size=16, batch_size=2, device="cpu", precision="fp32", compile="off",
    rounds=3, steps=1,
)  # fmt: skip


def test_train_compares_equal_first_steps_and_tells_medians_in_json(tmp_path, monkeypatch):
    rates = iter([5.0, 1.0, 1.0, 1000.0, 2.0, 1.0, 6.0, 3.0, 3.0])  # three rounds of three programs
    monkeypatch.setattr(train, "tokens_per_second", lambda step, config, device: next(rates) if step() else None)
    train.train(dataclasses.replace(STEPS, output=str(tmp_path / "figures.json")))
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert [figures[f"{name} tokens/s"] for name in ("etude", "huggingface", "huggingface plain")] == [6, 2, 1]
    assert figures["etude / huggingface"] == 3 and figures["etude / huggingface plain"] == 6
    assert figures["matmul TFLOP/s"] > 0 and "peak GiB of all, Python included" in figures


def test_train_refuses_a_peer_that_computes_something_else(monkeypatch):
    twin = train.huggingface_step

    def other(config, trainer, batches, precision):
        changed = [{**batch, "labels": batch["labels"].flip(1)} for batch in batches]
        return twin(config, trainer, changed, precision)

    monkeypatch.setattr(train, "huggingface_step", other)
    with pytest.raises(VerificationError, match="disagree on the first step: loss"):
        train.train(STEPS)


def test_data_compares_reading_and_tokenising_and_takes_as_many_steps_as_it_is_told(
    text_file, tokenizer_folder, tmp_path, monkeypatch
):
    from etude.training.trainer import Trainer

    made, step = [], Trainer.optimizer_step
    monkeypatch.setattr(Trainer, "optimizer_step", lambda self, batch: made.append(0) or step(self, batch))
    config = DataBenchmark(
        data=(str(text_file),), tokenizer=str(tokenizer_folder), megabytes=1, block_size=32, batch_size=2, preset="nano", device="cpu",
        rounds=2, output=str(tmp_path / "figures.json"),
    )  # fmt: skip
    monkeypatch.setattr("etude.training.trainer.pick_compile", lambda *_: False)
    monkeypatch.setattr(data, "sized", lambda texts, size, sized=data.sized: sized(texts, size // 20))
    data.data(config)
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert len(made) == 2 * 4 * (1 + 2)  # reading and having, four steps on a CPU, once to warm up and twice to be timed
    assert figures["ratio"] == pytest.approx(figures["from file to store MB/s"] / figures["encode_batch_fast MB/s"], rel=0.1)
    assert figures["step that reads its batch, ms"] > 0 and len(figures["all etude"]) == 2


# ---- decode -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_decode_compares_the_same_tokens(precision, tmp_path, capsys):
    decode.decode(DecodeBenchmark(**DECODING, precision=precision, output=str(tmp_path / "figures.json")))
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["tokens in fp32"].startswith("24 of 24 the same, ")
    for size in (1, 3):
        ours, theirs = (figures[f"batch {size}, {name} tokens/s"] for name in ("etude", "huggingface dynamic"))
        assert figures[f"batch {size}, etude / huggingface dynamic"] == pytest.approx(ours / theirs, rel=0.01)
        assert figures[f"batch {size}, etude mean gap"] <= (1e-5 if precision == "fp32" else decode.MAX_MEAN_GAP)
    printed = capsys.readouterr().out
    assert all(f"\n{name}  " in f"\n{printed}" for name in figures)


def test_random_weights_do_not_say_one_token_for_ever():
    config = DecodeBenchmark(**DECODING)
    prompts = decode.random_prompts(config, model := decode.starting_model(config), 3)
    assert len({token for row in decode.etude_program(config, model, prompts)() for token in row}) > 8


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 1}, {"qk_norm": True}, {"tie_word_embeddings": False}])
def test_decode_measures_a_model_of_ones_own(shape, tiny_config, tmp_path):
    torch.manual_seed(0)
    save_model(Etude(dataclasses.replace(tiny_config, **shape)), tmp_path)
    config = DecodeBenchmark(**DECODING | {"batch_sizes": (2,)}, model=str(tmp_path), precision="fp32")
    assert decode.compare(config)["tokens in fp32"].startswith("16 of 16 the same")
    with pytest.raises(UsageError, match=r"prompt_tokens \+ new_tokens \(69\) is more than the context of .* \(64\)"):
        decode.compare(DecodeBenchmark(**DECODING | {"prompt_tokens": 61}, model=str(tmp_path)))


def test_the_static_cache_gives_the_same_tokens():
    config = DecodeBenchmark(**DECODING)
    prompts = decode.random_prompts(config, model := decode.starting_model(config), 3)
    twin = decode.huggingface_twin(model, torch.float32)
    static = decode.huggingface_program(config, twin, prompts, "static")()
    assert (
        static
        == decode.huggingface_program(config, twin, prompts, "dynamic")()
        == decode.etude_program(config, model, prompts)()
    )


def test_decode_refuses_a_cache_that_loses_a_token(monkeypatch):
    update = KVCache.update

    def forgetful(self, layer, keys, values):
        keys, values = update(self, layer, keys, values)
        values = values.clone()
        values[:, :, 2] = 0
        return keys, values

    monkeypatch.setattr(KVCache, "update", forgetful)
    with pytest.raises(VerificationError, match="etude generates a token that is not the likeliest"):
        decode.compare(DecodeBenchmark(**DECODING))


def test_decode_refuses_a_program_that_is_wrong_only_when_it_is_timed(monkeypatch):
    """In the precision and the batch sizes that are measured: fp32 may be right, and the fast path not."""
    generate = plain.generate

    def wrong(model, prompts, settings):
        for step in generate(model, prompts, settings):
            shift = int(model.head_weight.dtype == torch.bfloat16)
            yield step._replace(tokens=[(token + shift) % 256 for token in step.tokens])

    monkeypatch.setattr(plain, "generate", wrong)
    with pytest.raises(VerificationError, match="etude generates unlikely tokens"):
        decode.compare(DecodeBenchmark(**DECODING, precision="bf16"))


def test_the_bound_counts_weights_and_cache_once_a_step():
    config = DecodeBenchmark(**DECODING)
    model = decode.starting_model(config).bfloat16()
    weights = 2 * sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    cache = KVCache(model.config, 3, 6 + 8 // 2, like=model.head_weight)
    cached = sum(tensor.nbytes for tensor in [*cache.keys, *cache.values])
    assert decode.bandwidth_bound(config, model, 3, bandwidth=1e9) == pytest.approx(3e9 / (weights + cached))


# ---- sft ----------------------------------------------------------------------------------------------------------------


def test_sft_compares_steps_on_the_same_conversations(tuning, tmp_path):
    figures = sft.compare(tuning, tmp_path)
    assert figures["conversations"].startswith("60, ")
    assert figures["places of padded rows filled"] < figures["places of packed rows filled"] <= 1
    rates = {name: figures[f"{name} useful tokens/s"] for name in ("packed", "padded", "huggingface")}
    for name in ("padded", "huggingface"):
        assert figures[f"packed / {name}"] == pytest.approx(rates["packed"] / rates[name], rel=0.01)


def test_useful_tokens_are_the_places_that_are_not_padding(rows):
    packed, padded = rows
    numbers = range(len(packed))
    filled = int((packed.load(numbers)["documents"] >= 0).sum())
    assert sft.load(packed, numbers)[1] == sft.load(padded, range(60))[1] == filled == len(packed.store) - 60
    assert packed.filled == filled / (len(packed) * 128) and padded.filled == filled / (60 * 128)


@pytest.mark.parametrize("count", range(4, 10))
def test_what_is_compared_first_teaches_the_same(rows, count):
    packed, padded = rows
    numbers = [number % len(packed) for number in range(count)]
    batches = [batch for batch, _ in sft.same_conversations(packed, padded, numbers)]
    ours, theirs = (sorted(batch["labels"][batch["labels"] != IGNORED].tolist()) for batch in batches)
    assert ours == theirs and len(ours) > 10
    assert {batch["ids"].shape for batch in batches} == {(count, 128)}


def test_a_batch_must_hold_the_conversations_of_a_row(rows):
    with pytest.raises(UsageError, match=r"batch_size \(1\) must be at least \d: so many conversations"):
        sft.same_conversations(*rows, [0])


def test_sft_refuses_steps_that_learn_something_else(tuning, tmp_path, monkeypatch):
    loss = losses.causal_lm_loss

    def halved(model, batch):
        found = loss(model, batch)
        return found if "documents" in batch else dataclasses.replace(found, sum=found.sum / 2)

    monkeypatch.setattr(losses, "causal_lm_loss", halved)
    with pytest.raises(VerificationError, match="packed, padded, huggingface disagree on the same conversations: loss "):
        sft.compare(tuning, tmp_path)


def test_sft_refuses_conversations_that_see_each_other(tuning, tmp_path, monkeypatch):
    load = SFTRows.load

    def mixed(self, rows):
        return {name: array for name, array in load(self, rows).items() if name not in ("documents", "ends")}

    monkeypatch.setattr(SFTRows, "load", mixed)
    with pytest.raises(VerificationError, match="packed conversations have other losses than padded ones"):
        sft.compare(tuning, tmp_path)


# ---- speedrun -----------------------------------------------------------------------------------------------------------

TINY = {
    "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "block_size": 32, "batch_size": 4,
    "micro_batch_size": 4, "compile": "off", "momentum_warmup": 3,
}  # fmt: skip


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_speedrun_starts_anew_after_its_warm_up_and_ends_with_its_schedule(
    qk_norm, text_file, tokenizer_folder, tmp_path, monkeypatch, capsys
):
    began, ended = [], []
    train = speedrun._train

    def watched(trainer, budget, rate):
        assert trainer.step == 0 and not any(optimizer.state for optimizer in trainer.optimizers)
        began.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        seconds = train(trainer, budget, 1e-9)  # one step: time is not what is tested
        ended.append(trainer.optimizers[0].param_groups[0]["lr"])
        return seconds

    monkeypatch.setattr(speedrun, "_train", watched)
    monkeypatch.setattr(report, "matmul_ceiling", lambda device, precision: 1e12)
    config = SpeedrunBenchmark(
        data=(str(text_file),), val_data=(str(text_file),), tokenizer=str(tokenizer_folder), preset="nano", seconds=0.1, device="cpu",
        settings={**TINY, "qk_norm": qk_norm, "warmup_fraction": 0.0}, output=str(tmp_path / "figures.json"),
    )  # fmt: skip
    speedrun.speedrun(config)
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["exports as"] == ("Qwen3" if qk_norm else "Llama") and figures["steps"] == 1 and figures["tokens"] == 128
    assert figures["val bits per byte"] > 0 and ended == [0.0]
    for name, tensor in began[0].items():  # new weights, as the recipe begins with
        assert name.endswith("norm.weight") or tensor.any() == (
            not name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight"))
        )


@pytest.mark.parametrize("settings", [{"preset": "small"}, {"lerning_rate": 1e-3}])
def test_speedrun_refuses_settings_that_it_has_not(text_file, tokenizer_folder, settings):
    config = SpeedrunBenchmark(data=(str(text_file),), tokenizer=str(tokenizer_folder), device="cpu", settings=settings)
    with pytest.raises(UsageError, match=f"settings: {next(iter(settings))} cannot be set here"):
        speedrun.speedrun(config)


def test_speedrun_refuses_to_train_with_nothing_to_measure_on(tokenizer_folder, tmp_path):
    (tmp_path / "one.txt").write_text(
        "A single document, too few for a hundredth of it to be held out. " * 50, encoding="utf-8"
    )
    config = SpeedrunBenchmark(data=(str(tmp_path / "one.txt"),), tokenizer=str(tokenizer_folder), device="cpu", settings=TINY)
    with pytest.raises(UsageError, match="there is no text to measure on"):
        speedrun.speedrun(config)


def test_speedrun_refuses_no_time():
    with pytest.raises(UsageError, match=r"seconds \(0.0\) must be greater than 0"):
        SpeedrunBenchmark(seconds=0.0)
