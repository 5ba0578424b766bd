"""The doctor: sound runs give no alarm; every mistake that is put into one is found, named, and told with what to do.

The runs are real and tiny, made once by the package itself; each test damages a copy.
"""

import dataclasses
import json
import math
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXTS, write_jsonl

from etude.data.batches import Batches
from etude.data.pretrain import PretrainBlocks, prepare_pretrain
from etude.data.sft import SFTRows, prepare_sft
from etude.doctor.config import DoctorConfig
from etude.doctor.curve import Origin, look_at_curve
from etude.doctor.examine import examine, kind_of
from etude.doctor.report import Report
from etude.doctor.run import look_at_checkpoints
from etude.errors import DataError, UsageError
from etude.losses import IGNORED, causal_lm_loss
from etude.runlog import RunLog
from etude.tokenizer import TURN_END, Tokenizer, train_tokenizer
from etude.training import checkpoint
from etude.training.config import PretrainConfig, SFTConfig
from etude.training.start import pretraining_model, starting_model
from etude.training.trainer import Trainer
from etude.weights import load_model, read_safetensors, save_model, write_safetensors

COMMON = {
    "block_size": 48, "batch_size": 4, "device": "cpu", "precision": "fp32", "log_every": 1, "eval_every": 6, "save_every": 6,
    "sample_every": 0, "val_fraction": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread; no pictures and no waiting for the disk, which take longer than all else here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "draw", lambda *arguments: None)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("doctor")


def text(number: int) -> str:
    return f"{number}. {TEXTS[number % len(TEXTS)]} {number * 7}"


def chat(number: int) -> dict:
    said = (("user", f"What is {number} + 1?"), ("assistant", f"It is {number + 1}."))
    return {"conversations": [{"role": role, "content": content} for role, content in said]}


@pytest.fixture(scope="module")
def texts(place) -> Path:
    return write_jsonl(place / "texts.jsonl", ({"text": text(number)} for number in range(120)))


@pytest.fixture(scope="module")
def chats(place) -> Path:
    return write_jsonl(place / "chats.jsonl", map(chat, range(80)))


@pytest.fixture(scope="module")
def pretrained(place, texts, tokenizer_folder) -> Path:
    """A finished pretraining run of 12 steps, with checkpoints at 6 and 12."""
    config = PretrainConfig(
        data=(str(texts),), output=str(place / "pretrained"), tokenizer=str(tokenizer_folder), token_cache=str(place / "cache"),
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        max_position_embeddings=64, tie_word_embeddings=True, max_steps=12, learning_rate=0.005, **COMMON,
    )  # fmt: skip
    tokenizer = Tokenizer(tokenizer_folder)
    train, val = prepare_pretrain(config.data, tokenizer, config.token_cache, val_fraction=0.1)
    blocks, val_blocks = (PretrainBlocks(store, config.block_size, tokenizer.pad_id) for store in (train, val))
    run_trainer(config, pretraining_model(config, tokenizer), tokenizer, blocks, val_blocks, train.info["content_sha256"])
    return Path(config.output)


def fine_tuned(place: Path, chats: Path, base: Path, name: str, loss=causal_lm_loss, **options) -> Path:
    settings = {"max_steps": 36, "learning_rate": 0.01, **COMMON, "save_every": 18, **options}
    config = SFTConfig(
        data=(str(chats),), output=str(place / name), init_from=str(base), token_cache=str(place / "cache"), **settings
    )
    model, tokenizer = starting_model(config, before="")
    train, val = prepare_sft(config.data, tokenizer, config.token_cache, config.block_size, val_fraction=0.1)
    rows, val_rows = (SFTRows(store, config.block_size, tokenizer.pad_id) for store in (train, val))
    run_trainer(config, model, tokenizer, rows, val_rows, train.info["content_sha256"], loss)
    return Path(config.output)


def run_trainer(config, model, tokenizer, samples, val, data: str, loss=causal_lm_loss) -> None:
    Trainer(
        config, model, tokenizer, batches=Batches(samples, config.batch_size, config.seed), loss=loss, val=val,
        fingerprints={"data": data, "tokenizer": tokenizer.fingerprint},
    ).run()  # fmt: skip


@pytest.fixture(scope="module")
def tuned(place, chats, pretrained) -> Path:
    """A finished SFT run that has learnt its replies."""
    return fine_tuned(place, chats, pretrained, "tuned")


@pytest.fixture
def run(pretrained, tmp_path) -> Path:
    return shutil.copytree(pretrained, tmp_path / "run")


@pytest.fixture
def sft_run(tuned, tmp_path) -> Path:
    return shutil.copytree(tuned, tmp_path / "sft_run")


@pytest.fixture
def own_tokenizer(tokenizer_folder, tmp_path) -> Path:
    return shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")


def look(*inputs: Path, **options) -> Report:
    return examine(DoctorConfig(input=tuple(map(str, inputs)), **options), tell=lambda line: None)


def told(report: Report, level: str) -> list[str]:
    return [f"{finding.check}: {finding.said}" for finding in report.findings if finding.level == level]


def assert_found(report: Report, *pieces: str, level: str = "BAD") -> None:
    """One finding of this level has all these pieces."""
    assert any(all(piece in said for piece in pieces) for said in told(report, level)), "\n".join(map(str, report.findings))
    assert report.exit_code == (70 if level == "BAD" or told(report, "BAD") else 0)


def assert_sound(report: Report) -> None:
    assert told(report, "BAD") == [] and report.exit_code == 0, told(report, "BAD")


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def change_weights(path: Path, change: Callable[[dict], object]) -> None:
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(tensors, path)


def remake_manifest(folder: Path) -> None:
    digests = {path.name: checkpoint.sha256(path) for path in sorted(folder.iterdir()) if path.name != checkpoint.MANIFEST}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(digests), encoding="utf-8")


# ---- what is sound -----------------------------------------------------------------------------------------------------


def test_sound_runs_give_no_alarm_and_every_check_is_made(pretrained, tuned):
    for run, unseen in ((pretrained, 1), (tuned, 0)):
        report = look(run)
        assert_sound(report)
        assert told(report, "warn") == [] or run == pretrained, told(report, "warn")
        assert report.count("--") == unseen, told(report, "--")
    checks = {finding.check for finding in report.findings if finding.level == "ok"}
    assert {
        "checkpoints", "loss curve", "final model", "round trip", "control tokens", "padding", "chat template", "config.json",
        "weights", "special ids", "trained tokenizer", "data: lines", "data: duplicates", "data: replies", "leakage", "near leakage",
        "activations", "causality", "packed rows", "loss", "end token",
    } <= checks  # fmt: skip


def test_short_and_unfinished_runs_give_no_alarm(place, chats, pretrained, tmp_path):
    short = fine_tuned(tmp_path, chats, pretrained, "short", max_steps=3, learning_rate=3e-5)
    assert_sound(look(short))
    (short / "model.safetensors").unlink()
    (short / "config.json").unlink()
    rewrite(checkpoint.found_in(short)[0] / "state.json", lambda state: state.update(steps=9))
    remake_manifest(checkpoint.found_in(short)[0])
    report = look(short)
    assert_sound(report)
    assert any("made of step-00000003" in said for said in told(report, "ok"))
    assert any("final model: the run is at step 3 of 9" in said for said in told(report, "--"))


@pytest.mark.parametrize("answer", ["skip_spikes", "rewind_on_spike"])
def test_steps_that_made_no_update_give_no_alarm(chats, pretrained, tmp_path, answer):
    """The optimizer has then counted fewer steps than the run."""
    calls = 0

    def spiking(model, batch):
        nonlocal calls
        calls += model.training
        loss = causal_lm_loss(model, batch)
        return dataclasses.replace(loss, sum=loss.sum * 1000) if model.training and calls == 22 else loss

    run = fine_tuned(tmp_path, chats, pretrained, "spiking", spiking, optimizer="muon", dropout=0.1, **{answer: 2})
    spikes = checkpoint.load(checkpoint.found_in(run)[0]).state["spikes"]
    assert spikes["skipped"] or spikes["quarantine"]
    assert_sound(look(run))


def test_each_part_of_a_run_can_be_looked_at_alone(tuned, chats, texts, tokenizer_folder):
    newest = checkpoint.found_in(tuned)[0]
    kinds = {
        tuned: "run",
        tuned / "best": "model",
        newest: "checkpoint",
        tokenizer_folder: "tokenizer",
        chats: "data",
        texts: "data",
    }
    for path, kind in kinds.items():
        assert kind_of(str(path)) == kind
        assert_sound(look(path))
    assert_sound(look(tuned / "best", chats, tokenizer_folder))
    assert_sound(look(chats, tokenizer=str(tokenizer_folder), block_size=48))


def test_an_export_is_sound(tuned, tmp_path):
    from etude.llama import config_to_hf

    model, tokenizer = load_model(tuned), Tokenizer(tuned)
    save_model(model, tmp_path / "llama")
    (tmp_path / "llama/config.json").write_text(json.dumps(config_to_hf(model.config)), encoding="utf-8")
    (tmp_path / "llama/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "pad_token_id": 0}), "utf-8")
    tokenizer.save(tmp_path / "llama")
    assert_sound(look(tmp_path / "llama"))


# ---- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
def test_a_flipped_bit_a_short_file_and_a_missing_one(run, name):
    newest = checkpoint.found_in(run)[0]
    path = newest / name
    whole = path.read_bytes()
    for damaged in (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], whole[:-5], None):
        path.write_bytes(damaged) if damaged is not None else path.unlink()
        report = look(run)
        assert_found(report, newest.name, name, "damaged" if damaged is not None else "missing", "delete this checkpoint")
        assert_found(report, "go on from step-00000006", level="warn")


def test_files_of_two_steps_in_one_checkpoint(run):
    newest, older = checkpoint.found_in(run)
    shutil.copy(older / "optimizer.safetensors", newest)
    assert_found(look(run), newest.name, "optimizer.safetensors is step-00000006's", "two steps")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optimizer.safetensors", "has made 6 updates, state.json tells of 12"),
        ("state.json", "state.json is of step 6"),
        ("rng.safetensors", "rng.safetensors is the same file as in"),
    ],
)
def test_a_manifest_remade_over_mixed_files_hides_nothing(run, name, expected):
    newest, older = checkpoint.found_in(run)
    shutil.copy(older / name, newest)
    remake_manifest(newest)
    assert_found(look(run), expected)


def test_equal_files_that_training_leaves_give_no_alarm(run):
    """The last step's learning rate may be 0, and fp16 leaves out steps that overflow."""
    newest, older = checkpoint.found_in(run)
    shutil.copy(older / "model.safetensors", newest)
    remake_manifest(newest)
    shutil.copy(older / "model.safetensors", run)
    report = look(run)
    assert_found(report, "model.safetensors is the same file as in step-00000006", "learning rate was 0", level="warn")
    assert_sound(report)
    for name in ("optimizer.safetensors", "rng.safetensors"):
        shutil.copy(older / name, newest)
    rewrite(newest / "state.json", lambda state: state.update(scaler={"scale": 1.0}))
    remake_manifest(newest)
    assert_sound(look(run))


def test_of_equal_optimizers_the_one_that_disagrees_is_named(run):
    newest, older = checkpoint.found_in(run)
    shutil.copy(newest / "optimizer.safetensors", older)
    remake_manifest(older)
    assert_found(look(run), "optimizer.safetensors is the same file", "delete step-00000006, whose files do not agree")


def test_a_finished_run_whose_checkpoints_are_damaged(run):
    newest, older = checkpoint.found_in(run)
    (newest / "rng.safetensors").write_bytes(b"")
    report = look(run)
    assert any("final model: its checkpoint (step 12) is damaged" in said for said in told(report, "--"))
    assert not any("older than the run" in said for said in told(report, "warn"))
    (older / "rng.safetensors").write_bytes(b"")
    assert_found(look(run), "none of 2 can be used", f"--init_from {run}")
    (run / "model.safetensors").write_bytes(b"")
    assert not any("--init_from" in said for said in told(look(run), "BAD"))


def test_what_is_kept_of_the_newest_checkpoint_is_not_its_optimizer(run):
    newest = look_at_checkpoints(run, Report(lambda line: None))
    assert newest.step == 12 and newest.model and not newest.optimizer and not newest.rng


def test_a_best_model_with_another_tokenizer(run, tmp_path):
    train_tokenizer([text.upper() for text in TEXTS] * 3, tmp_path / "other", vocab_size=320).save(run / "best")
    assert_found(look(run), "trained tokenizer", "best has another vocabulary", "than the run")
    shutil.rmtree(run / "checkpoints")
    assert_found(look(run), "trained tokenizer", "best has another vocabulary", "than the one in")


def test_optimizer_state_of_another_model(run):
    newest = checkpoint.found_in(run)[0]

    def spoil(tensors):
        tensors["adamw/exp_avg/norm.weight"] = torch.zeros(7)
        del tensors["adamw/exp_avg_sq/embed_tokens.weight"], tensors["adamw/exp_avg/embed_tokens.weight"]
        del tensors["adamw/step/embed_tokens.weight"]
        tensors["adamw/exp_avg/layers.9.weight"] = torch.zeros(2)

    change_weights(newest / "optimizer.safetensors", spoil)
    remake_manifest(newest)
    report = look(run)
    for piece in ("is (7,), the weight (32,)", "1 weights have none, embed_tokens.weight", "layers.9.weight is of no weight"):
        assert_found(report, newest.name, piece)


def test_a_checkpoint_of_another_version_and_one_that_is_garbage(run):
    newest, older = checkpoint.found_in(run)
    rewrite(newest / "state.json", lambda state: state.update(schema_version=1))
    (older / "state.json").write_text("[]", encoding="utf-8")
    remake_manifest(newest)
    remake_manifest(older)
    report = look(run)
    assert_found(report, newest.name, "schema_version 1")
    assert_found(report, older.name, "not a JSON object")
    assert_found(report, "none of 2 can be used")


def test_an_optimizer_state_that_is_not_finite(run):
    newest = checkpoint.found_in(run)[0]
    change_weights(newest / "optimizer.safetensors", lambda t: t["adamw/exp_avg/norm.weight"][3:4].fill_(math.inf))
    remake_manifest(newest)
    assert_found(look(run), newest.name, "state is not finite: adamw/exp_avg/norm.weight")


def test_a_final_model_that_is_missing_or_old_and_a_stretched_context(run):
    rewrite(run / "config.json", lambda config: config.update(max_position_embeddings=128))
    assert_found(look(run), "final model", "max_position_embeddings 64 → 128", level="warn")
    newest = checkpoint.found_in(run)[0]
    rewrite(newest / "state.json", lambda state: state.update(steps=24))
    remake_manifest(newest)
    assert_found(look(run), "final model: older than the run, which is at step 12 of 24", level="warn")
    rewrite(newest / "state.json", lambda state: state.update(steps=12))
    remake_manifest(newest)
    (run / "model.safetensors").unlink()
    (run / "config.json").unlink()
    report = look(run)
    assert_found(report, "final model", "its model was not written", level="warn")
    assert_sound(report)


@pytest.mark.parametrize("name", ["checkpoints/.step-00000018.1.x.tmp", "best/.model.safetensors.1.tmp", ".config.json.1.tmp"])
def test_leftovers_of_a_killed_process_are_a_warning(run, name):
    (run / name).mkdir(parents=True)
    report = look(run)
    assert_found(report, "leftovers", name, level="warn")
    assert_sound(report)


def test_a_final_model_or_a_config_that_is_not_the_run_s(run):
    shutil.copy(checkpoint.found_in(run)[1] / "model.safetensors", run)
    rewrite(run / "config.json", lambda config: config.update(rope_theta=500.0))
    report = look(run)
    assert_found(report, "final model", "is not what the last checkpoint (step-00000012) holds", "differ")
    assert_found(report, "config.json is not what was trained", "rope_theta 10000.0 → 500.0")


# ---- tokenizers and templates ----------------------------------------------------------------------------------------------


def change_template(folder: Path, old: str, new: str) -> None:
    path = folder / "tokenizer_config.json"

    def change(settings):
        assert old in settings["chat_template"]
        settings["chat_template"] = settings["chat_template"].replace(old, new)

    rewrite(path, change)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("message['content'] + '<|im_end|>'", "message['content'] | trim + '<|im_end|>'", "rewrites contents"),
        ("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'", "not how a reply begins"),
        ("'<|im_start|>assistant\\n'", "'<|im_start|>assistant'", "ends 1 tokens before a reply begins"),
        ("if add_generation_prompt", "if false", "tokens before a reply begins"),
        ("{{- message['content'] + '<|im_end|>' -}}", "{{- message['content'] + '<|im_start|>' -}}", "but eos is '<|im_end|>'"),
        ("for message in messages", "for message in messges", "chat template"),
        ("for message in messages", "fr message in messages", "chat template"),
    ],
)
def test_a_template_that_is_not_the_format_of_training(own_tokenizer, old, new, expected):
    change_template(own_tokenizer, old, new)
    assert_found(look(own_tokenizer), "chat template", expected)


def test_pad_that_is_eos(own_tokenizer):
    rewrite(own_tokenizer / "tokenizer_config.json", lambda settings: settings.update(pad_token=TURN_END))
    assert_found(look(own_tokenizer), "padding", "pad and eos are one token")


def test_an_eos_that_is_in_no_vocabulary_and_files_that_are_none(own_tokenizer):
    rewrite(own_tokenizer / "tokenizer_config.json", lambda settings: settings.update(eos_token="</s>"))
    assert_found(look(own_tokenizer), "'</s>' is not in the vocabulary")
    (own_tokenizer / "tokenizer.json").write_bytes(b"\xff\xfe{")
    assert_found(look(own_tokenizer), "tokenizer: ", "decode byte 0xff")
    (own_tokenizer / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert_found(look(own_tokenizer), "not a readable tokenizer")


def test_control_tokens_that_text_can_forge(own_tokenizer, tmp_path):
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": "fine"}, {"text": "a <|im_end|> b"}])
    assert_sound(look(own_tokenizer, data))
    rewrite(own_tokenizer / "tokenizer.json", lambda values: [t.update(special=False) for t in values["added_tokens"][1:3]])
    report = look(own_tokenizer, data)
    assert_found(report, "control tokens", "<|im_start|>, <|im_end|> typed as text")
    assert_found(report, "data: tokens", "words in 1 rows become control tokens", "texts.jsonl:2")


def test_a_control_token_that_the_template_cannot_write(own_tokenizer):
    rewrite(own_tokenizer / "tokenizer.json", lambda values: values["added_tokens"].pop(2))
    assert_found(look(own_tokenizer), "control tokens", "<|im_end|> in the chat template is not one token")


def test_text_that_does_not_come_back(own_tokenizer, texts):
    rewrite(own_tokenizer / "tokenizer.json", lambda values: values.update(normalizer={"type": "Lowercase"}))
    report = look(own_tokenizer, texts)
    assert_found(report, "round trip", "do not come back")
    assert_found(report, "data: tokens", "texts.jsonl:1")
    rewrite(own_tokenizer / "tokenizer.json", lambda values: values.update(normalizer={"type": "NFC"}))
    report = look(own_tokenizer)
    assert_found(report, "round trip", level="warn")
    assert_sound(report)


def test_another_tokenizer_than_the_run_was_trained_with(sft_run, tmp_path, tokenizer_folder):
    other = train_tokenizer([text.upper() for text in TEXTS] * 3, tmp_path / "other", vocab_size=320)
    assert_found(look(sft_run, tokenizer=str(tmp_path / "other")), "trained tokenizer", "other has another vocabulary")
    assert_found(look(sft_run / "best", tmp_path / "other"), "trained tokenizer", "other has another vocabulary")
    assert_sound(look(sft_run, tokenizer=str(tokenizer_folder)))
    other.save(sft_run)
    report = look(sft_run)
    assert_found(report, "trained tokenizer", "sft_run has another vocabulary")


# ---- model folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tuned, tmp_path) -> Path:
    return shutil.copytree(tuned / "best", tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        ({"eos_token_id": 0}, ("special ids", "config.json: eos_token_id is 0, the tokenizer's is 2")),
        ({"pad_token_id": 2, "bos_token_id": 1}, ("bos_token_id is 1", "pad_token_id is 2")),
        ({"vocab_size": 300}, ("vocabulary", "vocab_size (300) is smaller than the tokenizer's 320")),
        ({"rms_norm_eps": None}, ("config.json", "rms_norm_eps is missing")),
        ({"hidden_size": "wide"}, ("model", "wide")),
        ({"rope_scaling": {"rope_type": "linear", "factor": []}}, ("model", "factor")),
        ({"num_hidden_layers": 3}, ("model", "weights do not fit config.json")),
        ({"tie_word_embeddings": False}, ("tied head", "there is no lm_head.weight")),
        ({"auto_map": {"AutoModel": "evil.py"}}, ("config.json", "never runs such code")),
        ({"model_type": "gpt2"}, ("model", "model_type is 'gpt2'")),
    ],
)
def test_a_config_that_does_not_fit(folder, change, pieces):
    rewrite(folder / "config.json", lambda config: config.update(change))
    assert_found(look(folder), *pieces)


def test_a_config_that_is_none_and_one_that_names_no_eps(folder):
    rewrite(folder / "config.json", lambda config: config.pop("rms_norm_eps"))
    assert_found(look(folder), "config.json", "rms_norm_eps is missing")
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert_found(look(folder), "config.json", "not valid JSON")


def test_what_is_missing_beside_a_model(folder, tokenizer_folder):
    rewrite(folder / "config.json", lambda config: config.update(eos_token_id=None))
    assert_found(look(folder), "special ids", "names no eos_token_id", level="warn")
    (folder / "tokenizer.json").unlink()
    assert_found(look(folder), "tokenizer", "there is no tokenizer.json beside the model")
    assert_sound(look(folder, tokenizer=str(tokenizer_folder)))


def test_generation_config_has_an_eos_of_its_own(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}), encoding="utf-8")
    assert_found(look(folder), "generation_config.json: eos_token_id is [0, 1]")


def test_a_tied_model_with_a_head_of_its_own(folder):
    change_weights(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(320, 32)}))
    assert_found(look(folder), "tied head", "is there and differs")
    same = "model.embed_tokens.weight"
    change_weights(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t[same].clone()}))
    assert_found(look(folder), "tied head", "it need not be", level="warn")
    rewrite(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert_found(look(folder), "tied head", "equals the embedding", level="warn")


@pytest.mark.parametrize(
    ("value", "level", "pieces"),
    [
        (math.nan, "BAD", ("weights", "not finite: model.layers.1.mlp.up_proj.weight (1 of")),
        (5e4, "warn", ("weights", "extreme values: model.layers.1.mlp.up_proj.weight")),
    ],
)
def test_weights_that_training_does_not_leave(folder, value, level, pieces):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder / "model.safetensors", lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    report = look(folder)
    assert_found(report, *pieces, level=level)
    assert (level == "BAD") == any("behaviour: weights that are not finite" in said for said in told(report, "--"))


def test_weights_of_zero_and_files_that_are_none(folder):
    change_weights(folder / "model.safetensors", lambda t: t["model.layers.0.self_attn.v_proj.weight"].zero_())
    assert_found(look(folder), "nothing but zeros: model.layers.0.self_attn.v_proj.weight")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    assert_found(look(folder), "weights", "not a readable safetensors file")
    (folder / "model.safetensors").unlink()
    assert_found(look(folder), "weights", "there are no weights here")


# ---- what a model does ---------------------------------------------------------------------------------------------------------


def test_a_leak_from_the_future(tuned, monkeypatch):
    import torch.nn.functional as F

    from etude.model import attention

    real = F.scaled_dot_product_attention

    def not_causal(*arguments, is_causal, **keywords):
        return real(*arguments, is_causal=False, **keywords)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", not_causal)
    assert_found(look(tuned), "causality", "logits change by up to", "when later tokens do")


def test_a_leak_between_documents(tuned, monkeypatch):
    from etude.model import transformer

    real = transformer.document_mask
    monkeypatch.setattr(transformer, "document_mask", lambda documents: real(torch.zeros_like(documents)))
    report = look(tuned)
    assert_found(report, "packed rows", "document packed before it")
    assert any("causality: later tokens do not" in said for said in told(report, "ok"))


@pytest.mark.parametrize(
    ("weight", "module"),
    [
        ("model.layers.1.mlp.gate_proj.weight", "layers.1.mlp.gate_proj"),
        ("model.layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj"),
    ],
)
def test_where_nan_begins(folder, chats, weight, module):
    change_weights(folder / "model.safetensors", lambda tensors: tensors[weight].fill_(3e38))
    assert_found(look(folder, chats), "activations", "32 of 32 rows", f"first in {module}, at", "chats.jsonl:1")


def test_which_row_brings_nan(folder, tmp_path):
    rows = [chat(number) for number in range(20)]
    rows[7]["conversations"][0]["content"] += " Σ"
    data = write_jsonl(tmp_path / "chats.jsonl", rows)
    channel, tokens = 0, Tokenizer(folder).encode("Σ")

    def only_for_these(tensors):
        """Their channel overflows in the second product of layer 0; no other token has anything there."""
        tensors["model.embed_tokens.weight"][:, channel] = 0
        tensors["model.layers.0.self_attn.o_proj.weight"][channel] = 0
        tensors["model.embed_tokens.weight"][tokens, channel] = 1
        tensors["model.layers.0.mlp.up_proj.weight"][:, channel] = 3e38

    change_weights(folder / "model.safetensors", only_for_these)
    report = look(folder, data)
    assert_found(report, "activations", "1 of 20 rows", f"layers.0.mlp.up_proj, at {data}:8")


def test_an_end_token_that_was_never_learnt(place, chats, pretrained, tmp_path):
    eos = Tokenizer(pretrained).eos_id

    def without_ends(model, batch):
        return causal_lm_loss(model, {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == eos, IGNORED)})

    run = fine_tuned(tmp_path, chats, pretrained, "masked", loss=without_ends)
    assert_found(look(run), "end token", "likelier by", "so it was not learnt")
    assert told(look(run), "BAD") == [said for said in told(look(run), "BAD") if said.startswith("end token")]
    # Nothing is known of this one's training, so what is said is open.
    report = look(run / "best", chats)
    assert_found(report, "end token", "if this is a pretrained model", "if it had SFT", level="warn")
    assert_sound(report)
    assert_found(look(pretrained / "best", chats), "end token", "a short training, or none in chat", level="warn")


def test_a_tokenizer_that_was_exchanged_shows_in_the_loss_alone(sft_run, tmp_path):
    """A finished run may lose its checkpoints, and with them the fingerprint of its tokenizer."""
    shutil.rmtree(sft_run / "checkpoints")
    assert_sound(look(sft_run))
    train_tokenizer([text.upper() for text in TEXTS] * 3, tmp_path / "other", vocab_size=320).save(sft_run)
    assert_found(look(sft_run), "loss", "the run's last record is", "do not belong together")


def test_a_loss_worse_than_guessing_is_a_warning(folder, chats):
    change_weights(folder / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(-20))
    assert_found(look(folder, chats), "loss", "worse than guessing", level="warn")


# ---- data ---------------------------------------------------------------------------------------------------------------------------


def test_bad_lines_are_named_and_counted(tmp_path, chats):
    lines = chats.read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3][:-4]
    lines[9] = json.dumps({"conversations": [{"role": "user", "content": "only a question"}]})
    lines[11] = json.dumps({"text": "a text"})
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert_found(
        look(path), "data: lines", "3 bad beside 77 good", "bad.jsonl:4: not valid JSON", "bad.jsonl:10", "bad.jsonl:12"
    )
    path.write_bytes(b"\xff\xfe" + "\n".join(lines).encode("utf-16-le"))
    assert_found(look(path), "data: lines", "not UTF-8")
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xe9\nfine\n")
    assert_found(look(tmp_path / "bad.txt"), "1 bad beside 1 good", "bad.txt:2", "nothing after it was read")
    path.write_text("", encoding="utf-8")
    assert_found(look(path), "data: lines", "there is no row")


def test_copies_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "copies.jsonl", map(chat, [0, 1, 2, 1, 1, 0]))
    report = look(path)
    assert_found(report, "data: duplicates", "3 of 6 rows", "copies.jsonl:4 says what", "copies.jsonl:2 says", level="warn")
    assert_sound(report)


def test_validation_rows_that_training_sees(tmp_path, texts, run):
    alike = {
        "text": "The long winding road leads home through the quiet valley where nobody lives but a fox and her cubs all year."
    }
    train = write_jsonl(tmp_path / "train.jsonl", [*({"text": text(number)} for number in range(50)), alike])
    close = {"text": alike["text"].replace("all year.", "all year!") + " Indeed."}
    val = write_jsonl(tmp_path / "val.jsonl", [{"text": text(30)}, {"text": "Something else altogether."}, close])
    report = look(train, val_data=(str(val),))
    assert_found(report, "leakage", "1 of 3 validation rows", f"{val}:1 is {train}:31")
    assert_found(report, "near leakage", "1 of 3", f"{val}:3 is like {train}:51", level="warn")
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "Something else altogether, and more of it."}])
    assert_sound(look(train, val_data=(str(other),)))


def test_what_was_read_in_part_is_not_called_sound(tmp_path):
    """A leak or a copy beyond the rows that were read is not denied."""
    rows = [{"text": " ".join(f"w{number * word}x" for word in range(7, 19))} for number in range(1, 61)]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    val = write_jsonl(tmp_path / "val.jsonl", rows[55:56])
    report = look(train, val_data=(str(val),), max_rows=50)
    expected = (
        "data: duplicates: none among the first 50 rows",
        "leakage: none of 1",
        "near leakage: no validation row is much",
    )
    for piece in expected:
        assert any(said.startswith(piece) and "--max_rows 0 reads all" in said for said in told(report, "--")), piece
    report = look(train, val_data=(str(val),), max_rows=0)
    assert_found(report, "leakage", "1 of 1 validation rows")
    assert any("near leakage: no validation row is left to compare" in said for said in told(report, "--"))


def test_text_and_conversations_are_named_apart(tmp_path, texts, chats):
    report = look(texts, chats)
    assert_found(report, "data: text (", "texts.jsonl) and conversations (", "name them apart")
    assert report.count("BAD") == 1
    assert_found(look(texts, val_data=(str(chats),)), "val_data: conversations, where data are text")
    report = look(write_jsonl(tmp_path / "none.jsonl", [{"words": "x"}] * 3))
    assert_found(report, "3 bad beside 0 good")
    assert not any("--max_bad" in said for said in told(report, "BAD"))


def test_lengths_are_counted_on_evenly_spaced_rows(chats, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("etude.doctor.data.LENGTHS", 30)
    report = look(chats, tokenizer_folder)
    assert any("every reply of 30 conversations (evenly spaced, of 80)" in said for said in told(report, "ok"))


def test_without_the_library_near_copies_are_told_as_not_looked_at(tmp_path, texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    val = write_jsonl(tmp_path / "val.jsonl", [{"text": "Something else."}])
    assert any("near leakage" in said and "pip install" in said for said in told(look(texts, val_data=(str(val),)), "--"))


def test_rows_without_a_learnt_token_and_replies_that_are_cut(tmp_path, tokenizer_folder):
    rows = [chat(number) for number in range(30)]
    rows[4]["conversations"][0]["content"] = "long " * 100
    rows[6]["conversations"][1]["content"] = "long " * 100
    rows[8]["conversations"] += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "long " * 100}]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    report = look(path, tokenizer_folder, block_size=64)
    assert_found(report, "data: replies", "1 of 30 conversations hold no learnt token", "long.jsonl:5", "raise --block_size")
    assert_found(report, "1 of 30 conversations are cut inside", "long.jsonl:7", level="warn")
    assert_found(report, "1 of 30 conversations lose later rounds", level="warn")
    assert_sound(look(path, tokenizer_folder, block_size=2_000))


def test_data_that_is_gone_and_settings_that_are_none(run, tmp_path):
    content = (run / "run.yaml").read_text(encoding="utf-8")
    (run / "run.yaml").write_text(content.replace("texts.jsonl", "gone.jsonl"), encoding="utf-8")
    report = look(run)
    assert_sound(report)
    assert any("data: run.yaml's data is not here any more" in said and "--data" in said for said in told(report, "--"))
    assert_found(look(run, data=(str(tmp_path / "gone.jsonl"),)), "data: ", "no such file")
    for garbage in ("[1, 2]", "a: [", "batch_size: many\n", "!!python/object/apply:os.system ['false']"):
        (run / "run.yaml").write_text(garbage, encoding="utf-8")
        assert_found(look(run), "run.yaml", "not the settings of a run")


# ---- loss curves ------------------------------------------------------------------------------------------------------------------

SCRATCH = Origin(vocab_size=320, from_scratch=True)
CHANCE = math.log(320)


def curve(tmp_path: Path, losses, origin: Origin = SCRATCH, val=(), every: int = 1, **more) -> Report:
    """What the doctor makes of a metrics.jsonl with these losses."""
    records = [
        {"step": (n + 1) * every, "loss": loss, "grad_norm": 0.5, "tokens": (n + 1) * 100} for n, loss in enumerate(losses)
    ]
    records += [{"step": step, "val_loss": loss} for step, loss in val]
    for number, change in more.get("changes", {}).items():
        records[number].update(change)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    report = Report(lambda line: None)
    look_at_curve(path, origin, report)
    return report


def falling(steps: int, start: float = CHANCE, end: float = 2.0) -> list[float]:
    """A usual curve, with the noise of small batches."""
    noise = torch.rand(steps, generator=torch.Generator().manual_seed(0)).tolist()
    return [end + (start - end) * math.exp(-5 * n / steps) + 0.6 * (noise[n] - 0.5) * (n > 0) for n in range(steps)]


def test_usual_curves_are_in_order(tmp_path):
    for losses in (falling(100), falling(100)[:3], falling(12), falling(400, end=0.5), [CHANCE] * 8):
        report = curve(tmp_path, losses)
        assert [finding.level for finding in report.findings] == ["ok"], report.findings
    report = curve(tmp_path, [0.05 + 0.5 / (n + 1) for n in range(80)], Origin(320, from_scratch=False))  # SFT
    assert [finding.level for finding in report.findings] == ["ok"], report.findings


@pytest.mark.parametrize(
    ("losses", "pieces"),
    [
        ([CHANCE + 3, *falling(60)], ("first loss", "guessing costs", "initial weights are too large")),
        ([CHANCE / 2, *falling(60, start=CHANCE / 2)], ("first loss", "labels leak")),
        ([CHANCE] * 100, ("flat", "where guessing lies", "nothing is learnt")),
        ([CHANCE * math.exp(-n / 2) + 0.01 for n in range(80)], ("already", "check the causal mask")),
        ([*falling(40), *falling(60)], ("jumps from", "step 41", "resumed")),
        ([*falling(40, end=3.0), *(CHANCE + 0.1 * n for n in range(40))], ("rises from", "diverges")),
        ([*falling(30), math.nan, *falling(30)[20:]], ("loss is not finite", "step 31")),
        ([*falling(30), 0.0, *falling(30)[20:]], ("loss is exactly 0", "step 31")),
    ],
)
def test_curves_out_of_line(tmp_path, losses, pieces):
    assert_found(curve(tmp_path, losses), *pieces)


@pytest.mark.parametrize("deviation", [0.5, 0.8, 1.2])
def test_the_noise_of_small_batches_gives_no_alarm(tmp_path, deviation):
    """Three records in a row above the last eight come by chance, once in a few hundred; so may eight."""
    for seed in range(3):
        noise = torch.randn(6000, generator=torch.Generator().manual_seed(seed)).mul(deviation).tolist()
        losses = [max(0.05, 1.4 + 0.8 * math.exp(-n / 100) + off) for n, off in enumerate(noise)]
        assert_sound(curve(tmp_path, losses, Origin(320, from_scratch=False)))


def test_a_jump_at_the_end_is_a_warning_until_more_is_known(tmp_path):
    report = curve(tmp_path, [*falling(40), *falling(60)[:5]])
    assert_found(report, "jumps from", "step 41", "look again later", level="warn")
    assert_sound(report)


def test_a_spike_that_heals_and_overfitting_are_warnings(tmp_path):
    report = curve(tmp_path, [*falling(60), 9.0, *falling(60)[40:]])
    assert_found(report, "1 spikes that healed", "step 61", level="warn")
    assert_sound(report)
    report = curve(tmp_path, falling(100, end=0.5), val=[(20, 3.0), (40, 2.5), (60, 2.8), (80, 3.1), (100, 3.4)])
    assert_found(report, "validation is best at step 40", "learnt by heart", level="warn")
    assert_sound(report)


def test_records_out_of_order_and_gradients_of_nothing(tmp_path):
    assert_found(curve(tmp_path, falling(20), changes={9: {"step": 4}}), "steps do not grow (again at step 4)")
    assert_found(curve(tmp_path, falling(20), changes={9: {"grad_norm": 0.0}}), "grad_norm is exactly 0 (step 10)")
    assert_found(curve(tmp_path, falling(20), changes={9: {"tokens": 7}}), "tokens a step change at step 10", level="warn")


def test_a_damaged_metrics_file(run):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[4] = "{"
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert_found(look(run), "metrics.jsonl:5: not a record")


# ---- the script -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "tool/doctor.py"), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "tool/doctor.py"), run_name="__main__")
        return caught.value.code or 0, *capsys.readouterr()

    return call


def test_the_script_s_lines_and_exit_codes(call, run, chats, tmp_path):
    code, out, _ = call(chats)
    assert code == 0 and "ok    data: lines: 80 conversations" in out and out.endswith("not looked at\n")
    shutil.copy(checkpoint.found_in(run)[1] / "model.safetensors", run)
    code, out, _ = call(run, chats, "--samples", "4")
    assert code == 70 and "BAD   final model: " in out and out.splitlines()[-1].startswith("1 alarm, ")
    assert call()[0] == 2 and call(chats, "--samples", "0")[0] == 2
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "absent", ROOT / "Makefile"):
        code, out, err = call(nothing)
        assert code == 65 and err.startswith("error: ") and err.count("\n") == 1 and out == ""


def test_a_base_that_has_changed_is_told(sft_run, pretrained, tmp_path):
    from etude.training.start import weights_fingerprint

    newest = checkpoint.found_in(sft_run)[0]
    rewrite(newest / "state.json", lambda state: state["identity"].update(init_from=weights_fingerprint(str(pretrained))))
    remake_manifest(newest)
    assert told(look(sft_run), "warn") == []
    rewrite(newest / "state.json", lambda state: state["identity"].update(init_from="another"))
    remake_manifest(newest)
    assert_found(look(sft_run), "init_from", "does not hold the weights any more", level="warn")


def test_what_is_named_must_exist_before_anything_is_looked_at(chats):
    with pytest.raises(UsageError, match="pipe"):
        DoctorConfig(input=("-",))
    with pytest.raises(DataError, match="no such file"):
        look(chats, Path("nowhere"))
    with pytest.raises(UsageError, match="name what to look at"):
        DoctorConfig()


@pytest.mark.parametrize("name", ["checkpoints", "model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl"])
def test_a_part_of_a_folder_is_told_to_be_one(pretrained, name):
    with pytest.raises(DataError, match="name the folder it lies in"):
        look(pretrained / name)


def test_names_from_elsewhere_cannot_command_the_terminal():
    lines: list[str] = []
    Report(lines.append).bad("a\x1b[2J\nb", "c\r\u202ed")
    assert lines == ["BAD   a\ufffd[2J b: c \ufffdd"]


@pytest.mark.slow
def test_garbage_of_every_kind_becomes_findings(sft_run, tmp_path):
    """Each file in turn is emptied, cut, or made of other bytes; nothing is raised, and something is told."""
    import random

    source = random.Random(0)
    files = [path for path in sorted(sft_run.rglob("*")) if path.is_file() and path.suffix != ".png"]
    for path in files:
        whole = path.read_bytes()
        for garbage in (b"", whole[: len(whole) // 2], source.randbytes(200), b"null", b"[]", b'{"a": 1}', b"[" * 100_000):
            path.write_bytes(garbage)
            assert look(sft_run, samples=2, max_rows=20).findings
        path.write_bytes(whole)
    assert_sound(look(sft_run))
