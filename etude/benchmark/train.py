"""Compare Etude's training step with Hugging Face's Llama: same shape, precision, optimizer and batch, in one run. (The peer of 8 bits is one of
bf16: transformers has no training in 8 bits of its own.)
"""

import dataclasses
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

from etude.benchmark.report import in_turns, mfu_of, peaks_of, tell, wait, with_memory
from etude.cli import option
from etude.errors import UsageError


@dataclass(frozen=True)
class TrainBenchmark:
    preset: Literal["nano", "small", "base", "medium"] = option("small", "named shape")
    num_hidden_layers: int | None = option(None, "layers (default: the preset's)")
    vocab_size: int = option(16_384, "tokens in the vocabulary")
    block_size: int = option(512, "tokens of a sequence")
    batch_size: int = option(64, "sequences of a step")
    optimizer: Literal["adamw", "muon"] = option("adamw", "Etude's optimizer; the peer's is AdamW")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = option(
        "auto", "of Etude's matrix products, and with fp8 bf16 of the peer's; auto: what the hardware multiplies"
    )
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile, for both; auto: as in a long run, on where it works")
    rounds: int = option(5, "rounds in which the two take turns; the medians count")
    steps: int = option(10, "steps of a round")
    quick: bool = option(False, "a small shape and few steps, not compiled: a minute on two CPU cores")
    output: str = option("", "also write the figures to this .json file")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "batch_size", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least 1")


def train(config: TrainBenchmark) -> None:
    """Compare, and print the figures."""
    if config.quick:
        quick = {"preset": "nano", "vocab_size": 4_096, "block_size": 256, "batch_size": 16, "rounds": 3, "steps": 3}
        quick["compile"] = "off" if config.compile == "auto" else config.compile
        config = dataclasses.replace(config, **quick)
    if config.compile == "auto":
        from etude.device import pick_compile, pick_device

        config = dataclasses.replace(
            config, compile="on" if pick_compile("auto", pick_device(config.device), math.inf) else "off"
        )
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(config, folder)
    tell(figures, config.output)


def compare(config: TrainBenchmark, folder: str) -> dict[str, object]:
    """Time them in turns. On a CPU Hugging Face's model is timed twice: as Etude's, and as it comes, in fp32 and not compiled."""
    import torch

    from etude.device import describe

    ours, trainer, batches = etude_step(config, folder)
    device, flops = trainer.device, trainer.model.config.training_flops_per_token(config.block_size)
    steps = {"etude": ours, "huggingface": huggingface_step(config, trainer, batches, trainer.precision)}
    if device.type == "cpu":
        plain = dataclasses.replace(config, compile="off")
        steps["huggingface plain"] = huggingface_step(plain, trainer, batches, "fp32")
    firsts, peaks = {}, {}
    for name, step in steps.items():
        # The first compiles, too.
        warm_up, peaks[name] = with_memory(lambda step=step: [step() for _ in range(4)], device)
        firsts[name] = warm_up[0]
    agreement = require_agreement(firsts["etude"], firsts["huggingface"])
    measures = {name: lambda step=step: tokens_per_second(step, config, device) for name, step in steps.items()}
    rates = in_turns(measures, config.rounds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "machine": describe(device),
        "first step": agreement,
        "torch": torch.__version__,
        "precision": trainer.precision + (", compiled" if trainer.compiled else ""),
        **{f"{name} tokens/s": round(rate) for name, rate in medians.items()},
        **{f"etude / {name}": round(medians["etude"] / rate, 3) for name, rate in medians.items() if name != "etude"},
        **{f"all {name}": [round(rate) for rate in found] for name, found in rates.items()},
        **mfu_of(medians["etude"] * flops, device, trainer.precision),
        **peaks_of(peaks, sum(parameter.nbytes for parameter in trainer.model.parameters())),
    }


def etude_step(config: TrainBenchmark, folder: str):
    """The trainer's own step on random ids: the copy to the device, micro-batches, clipping, optimizer, checks and all."""
    import numpy as np
    import torch

    from etude.data.batches import Batches
    from etude.losses import causal_lm_loss
    from etude.model.config import EtudeConfig
    from etude.model.transformer import Etude
    from etude.training.config import PretrainConfig
    from etude.training.trainer import Trainer

    class RandomBlocks:
        block_size = config.block_size

        def __len__(self) -> int:
            return 1_000_000

        def load(self, numbers):
            source = np.random.default_rng(numbers[0])
            ids = source.integers(0, config.vocab_size, (len(numbers), config.block_size + 1))
            return {"ids": ids[:, :-1], "labels": ids[:, 1:]}

        def describe(self, number: int) -> str:
            return str(number)

    shape = EtudeConfig(vocab_size=config.vocab_size, max_position_embeddings=config.block_size, **shape_of(config))
    settings = PretrainConfig(
        output=folder, block_size=config.block_size, batch_size=config.batch_size, micro_batch_size=config.batch_size,
        max_steps=1_000_000, optimizer=config.optimizer, learning_rate=3e-4, device=config.device, precision=config.precision, compile=config.compile,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(settings, Etude(shape), None, Batches(RandomBlocks(), config.batch_size, 0), causal_lm_loss)
    trainer.model.train()
    batches = [trainer.batches.at(step) for step in range(4)]
    counter = iter(range(10**9))

    def step() -> tuple:
        measured = trainer.optimizer_step(batches[next(counter) % 4])
        return measured["loss"], measured["grad_norm"]

    return step, trainer, batches


def require_agreement(ours: tuple, theirs: tuple) -> str:
    """The first step's loss and gradient norm, from equal weights on an equal batch: a fast wrong step is worth nothing."""
    from etude.errors import VerificationError

    (loss, norm), (their_loss, their_norm) = ([float(value) for value in step] for step in (ours, theirs))
    found = f"loss {loss:.4f} / {their_loss:.4f}, gradient norm {norm:.4f} / {their_norm:.4f}"
    if abs(loss / their_loss - 1) > 1e-3 or abs(norm / their_norm - 1) > 2e-2:
        raise VerificationError(f"Etude and Hugging Face disagree on the first step: {found}")
    return found


def shape_of(config: TrainBenchmark) -> dict[str, int]:
    from etude.model.config import PRESETS

    layers = {} if config.num_hidden_layers is None else {"num_hidden_layers": config.num_hidden_layers}
    return PRESETS[config.preset] | layers


def huggingface_step(config: TrainBenchmark, trainer, batches: list, precision: str):
    """LlamaForCausalLM with the same weights, shape, fused AdamW and clipping, in the precision and compiled as said."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from etude.device import autocast
    from etude.weights import to_disk_name

    shape = LlamaConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.block_size, tie_word_embeddings=True,
        rms_norm_eps=trainer.model.config.rms_norm_eps, use_cache=False, **shape_of(config),
    )  # fmt: skip
    device = trainer.device
    model = LlamaForCausalLM(shape).to(device).train()
    model.load_state_dict({to_disk_name(name): tensor for name, tensor in trainer.model.state_dict().items()}, strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
    compiled = device.type == "cuda" if config.compile == "auto" else config.compile == "on"
    forward = torch.compile(model, dynamic=False) if compiled else model
    batches = [(batch["ids"].to(device).contiguous(), batch["labels"].to(device).contiguous()) for batch in batches]
    counter = iter(range(10**9))

    def step() -> tuple:
        ids, labels = batches[next(counter) % 4]
        with autocast(device, precision):
            loss = forward(input_ids=ids, labels=labels, shift_labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step


def tokens_per_second(step, config: TrainBenchmark, device) -> float:
    wait(device)
    started = time.perf_counter()
    for _ in range(config.steps):
        step()
    wait(device)
    return config.steps * config.batch_size * config.block_size / (time.perf_counter() - started)
