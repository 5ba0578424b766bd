"""Compare fine-tuning steps on packed rows with steps on rows that each hold one conversation, padded to block_size: Etude's own
and Hugging Face's Llama's, from the same weights, in the same precision and with the same optimizer, in turns in one run.

What counts is *useful* tokens: places of a row that hold a token of a conversation, supervised or context, not padding.
"""

import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from etude.benchmark.report import in_turns, lively_std, peaks_of, tell, wait, with_memory
from etude.benchmark.train import TrainBenchmark, huggingface_step, shape_of
from etude.cli import option
from etude.errors import UsageError, VerificationError

WARM_UP = 3  # steps
BATCHES = 4  # which a program goes through again and again, as huggingface_step does
# Of a token's loss in 16 bits, in nats. Rounding gives up to 0.03 in the presets; conversations that see each other, 1.3.
MAX_DIFFERENCE = 0.1
SAMPLE_TALKS = 12_000  # of the built-in sample: more than the batches hold


@dataclass(frozen=True)
class SFTBenchmark(TrainBenchmark):
    data: tuple[str, ...] = option((), "conversations: .jsonl files; left out: the built-in sample's")
    tokenizer: str = option("", "tokenizer folder; left out: one of vocab_size tokens is trained on the data")
    vocab_size: int = option(16_384, "tokens in the vocabulary, where no tokenizer is named")
    batch_size: int = option(64, "rows of a step, packed or padded")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "of matrix products; auto: what the hardware multiplies"
    )


@dataclass
class Program:
    """One way to train."""

    step: Callable[[], tuple]  # takes the next step; gives its loss and gradient norm
    useful: Iterator[int]  # the useful tokens of one step after the other
    filled: float  # the share of places that they fill, in the steps that are timed


def sft(config: SFTBenchmark) -> None:
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
    with tempfile.TemporaryDirectory(prefix="etude_benchmark_") as folder:
        figures = compare(config, Path(folder))
    tell(figures, config.output)


def compare(config: SFTBenchmark, folder: Path) -> dict[str, object]:
    import torch

    from etude.device import describe

    store, tokenizer = prepare(config, folder)
    vocab_size = len(tokenizer) if config.tokenizer else max(config.vocab_size, len(tokenizer))
    config = dataclasses.replace(config, vocab_size=vocab_size)
    packed, padded = packed_rows(config, store, tokenizer), padded_rows(config, store, tokenizer)
    ours, theirs = make_trainer(config, packed, folder), make_trainer(config, padded, folder)
    first, padded_first = same_conversations(packed, padded, ours.batches.numbers(0))
    difference = require_same_losses(ours, first[0], padded_first[0])
    programs = make_programs(config, (ours, first), (theirs, padded_first))
    device, precision = ours.device, ours.precision

    firsts, peaks = {}, {}
    for name, program in programs.items():

        def warm_up(program=program) -> tuple[float, ...]:
            next(program.useful)
            first = tuple(map(float, program.step()))  # compiles, too
            useful_per_second(program, WARM_UP, device)
            return first

        firsts[name], peaks[name] = with_memory(warm_up, device)
    agreement = require_agreement(firsts, precision)
    measures = {
        name: lambda program=program: useful_per_second(program, config.steps, device) for name, program in programs.items()
    }
    rates = in_turns(measures, config.rounds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    places = {name: rate / programs[name].filled for name, rate in medians.items()}  # per second, padding and all
    return {
        "machine": describe(device),
        "torch": torch.__version__,
        "model": f"{config.preset}, {ours.model.config.num_parameters()['total']:,} parameters",
        "precision": precision + (", compiled" if ours.compiled else ""),
        "conversations": f"{store.documents:,}, {len(store) / store.documents:.0f} tokens on average",
        "supervised share": round(store.supervised / (len(store) - store.documents), 4),
        "places of packed rows filled": round(packed.filled, 4),
        "places of padded rows filled": round(padded.filled, 4),
        "same conversations": agreement,
        "each token's loss": f"differs by {difference:.2g} nats (RMS), packed from padded",
        **{f"{name} useful tokens/s": round(rate) for name, rate in medians.items()},
        **{f"packed / {name}": round(medians["packed"] / rate, 3) for name, rate in medians.items() if name != "packed"},
        "packed / padded, by places": round(places["packed"] / places["padded"], 3),  # what attention by document costs
        **{f"all {name}": [round(rate) for rate in found] for name, found in rates.items()},
        **peaks_of(peaks, sum(parameter.nbytes for parameter in ours.model.parameters())),
    }


# --- data ------------------------------------------------------------------------------------------------------------


def prepare(config: SFTBenchmark, folder: Path):
    """The conversations as a token store, and the tokenizer."""
    from etude.corpus.jsonl import write_records
    from etude.corpus.sample.world import conversations
    from etude.data.sft import prepare_sft
    from etude.tokenizer import Tokenizer
    from etude.training.config import TokenizerConfig
    from etude.training.tokenizer import train

    data = config.data
    if not data:
        write_records(folder / "chats.jsonl", conversations(count=SAMPLE_TALKS))
        data = (str(folder / "chats.jsonl"),)
    if not config.tokenizer:
        train(TokenizerConfig(data=data, output=str(folder / "tokenizer"), vocab_size=config.vocab_size, max_bytes=10**7))
    tokenizer = Tokenizer(config.tokenizer or folder / "tokenizer")
    store, _ = prepare_sft(data, tokenizer, folder / "cache", config.block_size, val_fraction=0.0)
    return store, tokenizer


def packed_rows(config: SFTBenchmark, store, tokenizer):
    from etude.data.sft import SFTRows

    return SFTRows(store, config.block_size, tokenizer.pad_id)


def padded_rows(config: SFTBenchmark, store, tokenizer):
    """One conversation a row. Attention is plainly causal: padding stands behind, where no token looks."""
    from etude.data.sft import SFTRows

    class PaddedRows(SFTRows):
        def load(self, rows: Sequence[int]) -> dict:
            batch = super().load(rows)
            return {"ids": batch["ids"], "labels": batch["labels"]}

    rows = PaddedRows(store, config.block_size, tokenizer.pad_id)
    rows.rows = [[number] for number in range(store.documents)]
    return rows


def load(rows, numbers: Sequence[int]) -> tuple[dict, int]:
    """A batch of rows, and how many useful tokens it holds: a conversation of n tokens fills n - 1 places."""
    from etude.data.batches import as_tensors

    starts = rows.store.starts
    useful = sum(int(starts[d + 1] - starts[d]) - 1 for number in numbers for d in rows.documents(number))
    return as_tensors(rows.load(numbers)), useful


def same_conversations(packed, padded, numbers: Sequence[int]) -> tuple[tuple[dict, int], tuple[dict, int]]:
    """Two batches that teach the same, and how many useful tokens each holds: of the packed rows ``numbers`` as many as have no
    more conversations than the padded batch has rows. Further rows of either have no labels.
    """
    import torch

    from etude.losses import IGNORED

    rows, conversations, learnt = len(numbers), [], []
    for number in numbers:
        learnt.append(len(conversations) + len(packed.documents(number)) <= rows)
        conversations += packed.documents(number) if learnt[-1] else []
    if not conversations:
        fewest = min(len(packed.documents(number)) for number in numbers)
        raise UsageError(f"batch_size ({rows}) must be at least {fewest}: so many conversations does a packed row hold")
    ours, theirs = load(packed, numbers), load(padded, conversations + [0] * (rows - len(conversations)))
    ours[0]["labels"][~torch.tensor(learnt)] = IGNORED
    theirs[0]["labels"][len(conversations) :] = IGNORED
    return ours, theirs


# --- the programs ----------------------------------------------------------------------------------------------------


def make_programs(config: SFTBenchmark, packed: tuple, padded: tuple) -> dict[str, Program]:
    """Three programs that begin with the same conversations and weights. Etude's two are given as a trainer and its first batch."""

    def following(trainer, first: int) -> list:
        return [load(trainer.batches.samples, trainer.batches.numbers(step)) for step in range(first, BATCHES)]

    def program(step: Callable[[], tuple], first: list, again: list) -> Program:
        filled = sum(useful for _, useful in again) / (len(again) * config.batch_size * config.block_size)
        return Program(step, (useful for _, useful in itertools.chain(first, itertools.cycle(again))), filled)

    def etude_program(trainer, first: list, again: list) -> Program:
        batches = itertools.chain(first, itertools.cycle(again))

        def step() -> tuple:
            measured = trainer.optimizer_step(next(batches)[0])
            return measured["loss"], measured["grad_norm"]

        return program(step, first, again)

    (ours, first), (theirs, padded_first) = packed, padded
    again = [padded_first, *following(theirs, 1)]
    huggingface = huggingface_step(config, theirs, [batch for batch, _ in again], theirs.precision)
    return {
        "packed": etude_program(ours, [first], following(ours, 0)),
        "padded": etude_program(theirs, [], again),
        "huggingface": program(huggingface, [], again),
    }


def make_trainer(config: SFTBenchmark, rows, folder: Path):
    """The trainer of a fine-tuning run on ``rows``, with weights that are the same at every call."""
    import torch

    from etude.data.batches import Batches
    from etude.losses import causal_lm_loss
    from etude.model.config import EtudeConfig
    from etude.model.transformer import Etude
    from etude.training.config import SFTConfig
    from etude.training.trainer import Trainer

    shape = shape_of(config)
    settings = SFTConfig(
        output=str(folder / "run"), block_size=config.block_size, batch_size=config.batch_size,
        micro_batch_size=config.batch_size, max_steps=1_000_000, optimizer=config.optimizer, learning_rate=3e-5,
        device=config.device, precision=config.precision, compile=config.compile,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Etude(
        EtudeConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.block_size,
            initializer_range=lively_std(shape["hidden_size"]),
            **shape,
        )
    )
    trainer = Trainer(settings, model, None, Batches(rows, config.batch_size, 0), causal_lm_loss)
    trainer.model.train()
    return trainer


def require_same_losses(trainer, *batches: dict) -> float:
    """By how many nats (RMS) a supervised token's loss in the one batch differs from the same token's in the other."""
    import torch
    import torch.nn.functional as F

    from etude.data.batches import to_device
    from etude.device import autocast
    from etude.losses import IGNORED

    found = []
    for batch in (to_device(batch, trainer.device) for batch in batches):
        ids, labels = batch.pop("ids"), batch.pop("labels").flatten()
        learnt = labels != IGNORED
        with torch.no_grad(), autocast(trainer.device, trainer.precision):
            hidden = trainer.model.hidden(ids, **batch).flatten(0, 1)[learnt]
            found.append(F.cross_entropy(trainer.model.logits(hidden).float(), labels[learnt], reduction="none"))
    difference = (found[0] - found[1]).square().mean().sqrt().item()
    if not difference <= (1e-3 if trainer.precision == "fp32" else MAX_DIFFERENCE):  # so put, NaN is refused as well
        raise VerificationError(
            f"packed conversations have other losses than padded ones: they differ by {difference:.2g} nats (RMS)"
        )
    return difference


def require_agreement(firsts: dict[str, tuple[float, float]], precision: str) -> str:
    """The first step's loss per supervised token and gradient norm, from equal weights on the same conversations."""
    loss, norm = firsts["packed"]
    found = (
        f"loss {' / '.join(f'{loss:.4f}' for loss, _ in firsts.values())}, "
        f"gradient norm {' / '.join(f'{norm:.4f}' for _, norm in firsts.values())}"
    )
    for name, (their_loss, their_norm) in firsts.items():
        # In 16 bits Hugging Face's rounding is not Etude's.
        allowed = 1e-4 if precision == "fp32" else 3e-3 if name == "huggingface" else 1e-3
        # So put, NaN is refused as well.
        if not (abs(their_loss / loss - 1) <= allowed and abs(their_norm / norm - 1) <= 2e-2):
            raise VerificationError(f"{', '.join(firsts)} disagree on the same conversations: {found}")
    return found


def useful_per_second(program: Program, steps: int, device) -> float:
    """Useful tokens per second of the next ``steps`` steps."""
    wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        program.step()
    wait(device)
    seconds = time.perf_counter() - started
    return sum(next(program.useful) for _ in range(steps)) / seconds
