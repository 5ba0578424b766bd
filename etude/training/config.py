"""The numbers a person edits, with their defaults and what they mean. Importing this costs nothing (no torch)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from etude import paths
from etude.cli import option
from etude.errors import UsageError
from etude.model.config import PRESETS
from etude.training import recipe


@dataclass(frozen=True)
class TokenizerConfig:
    """What train_tokenizer.py reads."""

    data: tuple[str, ...] = option(
        lambda: (paths.training_data("pretrain/pretrain_hq.jsonl"),),
        "text and conversations to learn from: .jsonl or .txt files, folders, globs",
    )
    output: str = option(lambda: paths.weight("tokenizer"), "folder to write the tokenizer to")
    vocab_size: int = option(16_384, "tokens in the vocabulary, special ones included; multiples of 64 train fastest on GPUs")
    max_bytes: int = option(512 * 2**20, "read a seeded sample of about this many bytes of text (0: all of it)")
    default_system: str = option("", "system turn for conversations that have none of their own (empty: none)")
    text_key: str = option("text", "key of the text in .jsonl records")
    text_unit: Literal["line", "file"] = option("line", "what one document is in .txt files")
    seed: int = option(0, "seed of the sample")
    max_bad: int = option(0, "bad records to skip and list before giving up")

    def __post_init__(self) -> None:
        _at_least(self, 0, "max_bytes", "max_bad")


@dataclass(frozen=True)
class TrainingConfig:
    """What every training stage has in common."""

    data: tuple[str, ...] = ()
    output: str = ""
    val_data: tuple[str, ...] = option((), "validation data (default: hold out val_fraction of data)")
    val_fraction: float = option(0.01, "share of the documents held out for validation, where there is no val_data")
    token_cache: str = option(lambda: paths.training_data("tokenized"), "folder that keeps data once tokenised")
    max_bad: int = option(0, "bad records to skip and list before giving up")

    resume: str = option(
        "auto", "auto: go on from output's newest checkpoint, if any; never: start over; or a checkpoint folder"
    )
    allow_mismatch: str = option("", "settings that may differ from the checkpoint's on resume, separated by commas")

    block_size: int = option(512, "tokens of a training sequence")
    batch_size: int = option(16, "sequences per optimizer step, over all processes")
    micro_batch_size: int | None = option(
        None, "sequences per forward pass (default: what 32,768 tokens hold); same result, less memory"
    )
    auto_micro_batch: bool = option(
        False, "out of memory: halve micro_batch_size and go on, with the same gradient (but for dropout)"
    )
    gradient_checkpointing: bool = option(
        False,
        "keep little of the forward pass and compute it again: a third of the memory, a fourth more time, the same gradient",
    )
    epochs: float = option(3.0, "passes over the data")
    max_steps: int | None = option(None, "optimizer steps; takes the place of epochs")

    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: Muon for the layers' matrices, AdamW for the rest")
    learning_rate: float = option(3e-4, "peak learning rate (Muon's updates are scaled to suit the same number)")
    schedule: Literal["linear", "cosine", "wsd"] = option(
        "cosine", "after warm-up; wsd: stay at the peak, then fall to the end"
    )
    warmup_fraction: float = option(0.02, "share of the steps over which the learning rate rises to its peak")
    decay_fraction: float = option(0.4, "share of the steps over which it falls, for wsd")
    final_lr_fraction: float = option(0.1, "learning rate at the last step, as a share of the peak")
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices of the layers and an untied head only")
    beta1: float = option(0.9, "AdamW's decay of the gradient's mean")
    beta2: float = option(0.95, "AdamW's decay of the gradient's square")
    epsilon: float = option(1e-8, "AdamW's epsilon")
    momentum: float = option(0.95, "Muon's momentum")
    momentum_warmup: int = option(0, "steps over which Muon's momentum rises to that from 0.85")
    query_key_learning_rate: float | None = option(
        None, "peak for the query and key projections (default: learning_rate); a third of it lets the rest learn faster"
    )
    embedding_learning_rate: float | None = option(None, "peak for the token embedding (default: learning_rate)")
    head_learning_rate: float | None = option(None, "peak for an untied head (default: learning_rate)")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm (0: never)")
    spike_factor: float = option(5.0, "a loss or gradient norm above so many times the median of the last 64 steps is a spike")
    skip_spikes: int = option(0, "skip the update of a step that spikes, at most so often (0: never)")
    rewind_on_spike: int = option(
        0, "at a spike go back to the last checkpoint and leave that step's documents out, at most so often (0: never)"
    )
    dropout: float | None = option(None, "share of activations dropped in training (default: the model's own)")

    seed: int = option(0, "seed of initial weights, data order, validation split and dropout")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = option(
        "auto",
        "of matrix products; weights are fp32. auto: what the hardware multiplies; fp8: bf16, and 8 bits in training's large products, "
        "on Ada, Hopper and newer GPUs",
    )
    parallel: Literal["ddp", "fsdp", "hsdp"] = option(
        "ddp",
        "several processes (torchrun): ddp: each with the whole model; fsdp: model and optimizer divided over them; hsdp: divided over "
        "those of one machine, each machine with a copy",
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile; auto: on for CUDA, and for long runs on a Linux CPU with a C++ compiler"
    )
    deterministic: bool = option(False, "ask a GPU for operations whose result does not depend on timing")
    collective_timeout: float = option(
        600.0, "seconds after which a process that does not answer is given up (torchrun); a step must take less"
    )
    threads: int = option(0, "CPU threads (0: torch's choice)")

    log_every: int = option(10, "steps between records in metrics.jsonl")
    eval_every: int | None = option(None, "steps between validations (default: a tenth of the run; 0: only at the end)")
    max_eval_tokens: int = option(131_072, "tokens of the validation data to use each time (0: all)")
    save_every: int | None = option(None, "steps between checkpoints (default: a tenth of the run)")
    keep_checkpoints: int = option(2, "newest checkpoints to keep")
    sample_every: int | None = option(None, "steps between printed samples (default: a fifth of the run; 0: never)")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "where to send metrics besides metrics.jsonl")

    plan: bool = option(
        False, "measure some steps, print what the run would take (memory, time, disk, cost), and train nothing"
    )
    hourly_price: float = option(0.0, "what an hour of this machine costs, for plan (0: no line about it)")

    def __post_init__(self) -> None:
        _at_least(self, 1, "block_size", "batch_size", "log_every", "keep_checkpoints")
        _at_least(
            self,
            0,
            "max_bad",
            "seed",
            "skip_spikes",
            "rewind_on_spike",
            "threads",
            "max_eval_tokens",
            "learning_rate",
            "query_key_learning_rate",
            "embedding_learning_rate",
            "head_learning_rate",
            "momentum_warmup",
            "weight_decay",
            "max_grad_norm",
        )
        for name in ("query_key_learning_rate", "embedding_learning_rate", "head_learning_rate"):
            if self.learning_rate == 0 and getattr(self, name):
                raise UsageError(
                    f"{name} ({getattr(self, name)}) follows learning_rate, which is 0; give that a value, however small"
                )
        _at_least(self, 1, "micro_batch_size", "max_steps", "save_every")
        _at_least(self, 0, "eval_every", "sample_every")
        for name in ("val_fraction", "warmup_fraction", "decay_fraction", "final_lr_fraction", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name} ({value}) must be between 0 and 1")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least 0 and less than 1")
        if not 0 < self.epochs < math.inf:
            raise UsageError(f"epochs ({self.epochs}) must be greater than 0, and finite")
        if not 0 < self.epsilon < math.inf:
            raise UsageError(f"epsilon ({self.epsilon}) must be greater than 0")
        if not self.collective_timeout > 0:
            raise UsageError(f"collective_timeout ({self.collective_timeout}) must be greater than 0")
        if not 0 <= self.hourly_price < math.inf:
            raise UsageError(f"hourly_price ({self.hourly_price}) must be at least 0, and finite")
        if not self.spike_factor > 1:
            raise UsageError(f"spike_factor ({self.spike_factor}) must be greater than 1")
        if self.skip_spikes and self.rewind_on_spike:
            raise UsageError("skip_spikes and rewind_on_spike are two answers to one thing; choose one")
        if self.seed >= 2**32:
            raise UsageError(f"seed ({self.seed}) must be less than 2^32")


# On resume these may differ: they do not change what is computed, or only when it stops.
TOLD_BY_CONTENT = {"data", "val_data", "output", "token_cache", "tokenizer", "init_from"}  # and not by where they lie
FREE_ON_RESUME = TOLD_BY_CONTENT | {
    "resume", "allow_mismatch", "micro_batch_size", "auto_micro_batch", "gradient_checkpointing", "epochs", "max_steps",
    "device", "compile", "deterministic", "threads", "collective_timeout", "parallel",
    "log_every", "eval_every", "max_eval_tokens", "save_every", "keep_checkpoints", "sample_every", "tracker", "max_bad",
    "plan", "hourly_price", "workers",
}  # fmt: skip


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """What train_pretrain.py reads. The model's shape is set here and nowhere else."""

    data: tuple[str, ...] = option(
        lambda: (paths.training_data("pretrain/pretrain_hq.jsonl"),), "text to learn from: .jsonl or .txt files, folders, globs"
    )
    output: str = option(lambda: paths.weight("etude_pretrained_model"), "folder of the run and its model")
    depth: int | None = option(
        None,
        "one dial for shape, batch and length: so many layers, 64 channels for each (in whole heads of 128), and 20 tokens for each of "
        "the layers' weights",
    )
    batch_size: int | None = option(None, "sequences per optimizer step, over all processes (default: 16, or what suits depth)")
    epochs: float | None = option(None, "passes over the data (default: 3, or as many as the tokens take that depth asks for)")
    optimizer: Literal["adamw", "muon"] | None = option(
        None, "muon: Muon for the layers' matrices, AdamW for the rest (default: muon, and with init_from adamw)"
    )
    learning_rate: float | None = option(
        None, "peak learning rate (default: what suits the optimizer, the tokens of a step and the width; with init_from 3e-4)"
    )
    schedule: Literal["linear", "cosine", "wsd"] = option("wsd", "after warm-up; wsd: stay at the peak, then fall to the end")
    final_lr_fraction: float = option(0.0, "learning rate at the last step, as a share of the peak")
    momentum_warmup: int = option(300, "steps over which Muon's momentum rises to its value from 0.85")
    query_key_learning_rate: float | None = option(
        None, "peak for the query and key projections (default: with Muon and fan_in a third of learning_rate, else the same)"
    )
    embedding_learning_rate: float | None = option(
        None,
        "peak for the token embedding (default: with Muon and fan_in 22 times learning_rate, or a third if tied; else the same)",
    )
    head_learning_rate: float | None = option(
        None, "peak for an untied head (default: with Muon and fan_in 0.44 of learning_rate, else the same)"
    )
    tokenizer: str | None = option(None, "tokenizer folder (default: weight/tokenizer, or that of init_from)")
    init_from: str = option("", "start from the weights in this model folder (Etude's or a Llama); its shape is kept")
    text_key: str = option("text", "key of the text in .jsonl records")
    text_unit: Literal["line", "file"] = option("line", "what one document is in .txt files")
    workers: int = option(0, "processes that tokenise (0: one a core, if there is text enough to pay for their start)")
    separate_documents: bool = option(False, "stop attention at document boundaries inside a block")
    sample_prompt: str = option("", "what printed samples begin with (default: the beginning of a validation document)")

    preset: Literal["auto", "nano", "small", "base", "medium"] = option(
        "auto", "named shape; auto: small on an accelerator, nano on a CPU"
    )
    hidden_size: int | None = option(None, "channels of the residual stream (default: the preset's)")
    num_hidden_layers: int | None = option(None, "layers (default: the preset's)")
    num_attention_heads: int | None = option(None, "query heads (default: the preset's)")
    num_key_value_heads: int | None = option(None, "key and value heads (default: as many as query heads)")
    head_dim: int | None = option(None, "channels of a head (default: hidden_size / num_attention_heads)")
    intermediate_size: int | None = option(
        None, "channels inside the feed-forward layer (default: the preset's, or 8/3 of hidden_size)"
    )
    max_position_embeddings: int | None = option(None, "longest context in tokens (default: block_size)")
    rms_norm_eps: float = option(1e-5, "epsilon of RMSNorm")
    rope_theta: float = option(10_000.0, "base of the rotary embedding's wavelengths")
    rope_scaling: dict | None = option(
        None, 'context extension, as JSON: {"rope_type": "llama3" | "linear" | "yarn", "factor": …}'
    )
    tie_word_embeddings: bool = option(False, "share the embedding with the output head")
    qk_norm: bool = option(False, "normalise queries and keys; the export is then a Qwen3")
    initializer: Literal["normal", "fan_in"] = option(
        "fan_in",
        "normal: initializer_range everywhere; fan_in: 1 / sqrt(inputs), and nothing that the residual stream starts with "
        "but the embedding",
    )
    initializer_range: float = option(0.02, "standard deviation of the initial weights")

    def __post_init__(self) -> None:
        if self.depth is not None:
            self._check_depth()
        _at_least(self, 0, "workers")
        recipe.fill_in(self)
        super().__post_init__()

    def _check_depth(self) -> None:
        _at_least(self, 1, "depth", "block_size")
        for name, plain in (("preset", "auto"), ("init_from", ""), ("num_hidden_layers", None), ("hidden_size", None)):
            if getattr(self, name) != plain:
                raise UsageError(f"depth and {name} are two answers to one thing; choose one")

    def model_shape(self, on_accelerator: bool) -> dict:
        """EtudeConfig's fields but for those that the tokenizer decides."""
        name = ("small" if on_accelerator else "nano") if self.preset == "auto" else self.preset
        shape = dict(PRESETS[name] if self.depth is None else recipe.shape_of(self.depth))
        if self.hidden_size is not None and self.intermediate_size is None:
            shape.pop("intermediate_size")  # the preset's would not fit another width
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for key in SHAPE_FIELDS:
            if given[key] is not None:
                shape[key] = given[key]
        shape.setdefault("max_position_embeddings", self.block_size)
        return shape


SHAPE_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "qk_norm",
    "initializer_range",
)  # fmt: skip


@dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """What train_sft.py reads. The model's shape comes from the model it starts from."""

    data: tuple[str, ...] = option(
        lambda: (paths.training_data("sft/sft_mini_512.jsonl"),), "conversations: .jsonl files, folders, globs"
    )
    output: str = option(lambda: paths.weight("etude_sft_model"), "folder of the run and its model")
    init_from: str = option(lambda: paths.weight("etude_pretrained_model"), "model folder to start from (Etude's or a Llama)")
    batch_size: int = option(8, "packed rows per optimizer step, over all processes")
    learning_rate: float | None = option(
        None,
        "peak learning rate (default: 0.23 / hidden_size, at most 1.5e-3, for a model in Etude's own format, 3e-5 for others)",
    )
    sample_prompt: str = option("", "question that printed samples answer (default: one of the validation data)")

    def __post_init__(self) -> None:
        recipe.fill_in_for_fine_tuning(self)
        super().__post_init__()


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not value >= least:
            raise UsageError(f"{name} ({value}) must be at least {least}")
