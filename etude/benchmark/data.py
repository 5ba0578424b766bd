"""Measure the way from text to batches, beside what the tokenizers library does with texts that lie in memory already; and training
steps that read their batches, beside steps on a batch that lies on the device.

MB are 10^6 bytes of UTF-8 text, on all cores; what is compared takes turns in one run. Memory is that of a process that tokenises
a quarter of the text, and all of it, with the processes that help it: a flat one is the same.
"""

import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from etude.benchmark.report import in_turns, tell, wait
from etude.cli import option
from etude.errors import UsageError


@dataclass(frozen=True)
class DataBenchmark:
    data: tuple[str, ...] = option((), "texts: .jsonl or .txt files; left out: the built-in sample")
    tokenizer: str = option("", "tokenizer folder; left out: one of 16,384 tokens is trained on the data")
    megabytes: int = option(40, "the data is repeated to so many MB, or cut to them")
    block_size: int = option(512, "tokens of a sequence")
    batch_size: int = option(64, "sequences of a batch")
    preset: Literal["auto", "nano", "small", "base", "medium"] = option(
        "auto", "shape of the model that steps; auto: small on an accelerator, nano on a CPU"
    )
    steps: int | None = option(None, "steps of a round (default: 20 on an accelerator, 4 on a CPU)")
    device: str = option("auto", "where the steps are: auto, cpu, cuda, cuda:N or mps")
    rounds: int = option(5, "rounds in which all take turns; the medians count")
    quick: bool = option(False, "8 MB, three rounds of two small steps: a minute on two CPU cores")
    output: str = option("", "also write the figures to this .json file")

    def __post_init__(self) -> None:
        for name in ("megabytes", "block_size", "batch_size", "rounds", "steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} ({value}) must be at least 1")


def data(config: DataBenchmark) -> None:
    """Compare, and print the figures."""
    if config.quick:
        config = dataclasses.replace(config, megabytes=8, rounds=3, batch_size=8, block_size=256, steps=2)
    with tempfile.TemporaryDirectory(prefix="etude_benchmark_") as name:
        tell(compare(config, Path(name)), config.output)


def compare(config: DataBenchmark, folder: Path) -> dict[str, object]:
    import tokenizers

    from etude.data.batches import Batches
    from etude.data.pretrain import PretrainBlocks, prepare_pretrain
    from etude.tokenizer import Tokenizer

    texts = sized(config.data, config.megabytes * 10**6)
    write(texts, folder / "texts.jsonl")
    write(texts[: max(1, len(texts) // 4)], folder / "quarter.jsonl")
    tokenizer = Tokenizer(config.tokenizer or trained(folder))
    raw = tokenizers.Tokenizer.from_str(tokenizer.json)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rates: dict[str, list[float]] = {"etude": [], "tokenizers": []}
    for number in range(config.rounds):
        started = time.perf_counter()
        train, _ = prepare_pretrain(
            [str(folder / "texts.jsonl")], tokenizer, folder / f"cache{number}", val_fraction=0.0, workers=0
        )  # reads, parses, tokenises, writes and checks sums
        rates["etude"].append(megabytes / (time.perf_counter() - started))
        started = time.perf_counter()
        raw.encode_batch_fast(texts, add_special_tokens=False)
        rates["tokenizers"].append(megabytes / (time.perf_counter() - started))
    batches = Batches(PretrainBlocks(train, config.block_size, tokenizer.pad_id), config.batch_size, seed=0)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 2:
        batches.at(count)
        count += 1
    loaded = count * config.batch_size * config.block_size / (time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    peaks = {
        name: tokenising_peak(folder / f"{name}.jsonl", config.tokenizer or folder / "tokenizer")
        for name in ("quarter", "texts")
    }
    machine, seconds = step_seconds(config, folder, tokenizer, train)
    read, there = (statistics.median(seconds[name]) for name in ("reading", "there"))
    return {
        "machine": machine,
        "text": f"{megabytes:.1f} MB, {len(texts):,} documents",
        "from file to store MB/s": round(medians["etude"], 2),
        "encode_batch_fast MB/s": round(medians["tokenizers"], 2),
        "ratio": round(medians["etude"] / medians["tokenizers"], 3),
        **{f"all {name}": [round(rate, 2) for rate in found] for name, found in rates.items()},
        "memory for a quarter, for all, MiB": [round(peak / 2**20) if peak else None for peak in peaks.values()],
        "batches tokens/s": round(loaded),
        "step that reads its batch, ms": round(read * 1000, 3),
        "step on a batch on the device, ms": round(there * 1000, 3),
        "their ratio": round(read / there, 4),
    }


def tokenising_peak(texts: Path, tokenizer: str | Path) -> int | None:
    """Bytes of memory that a process of its own and its helpers take at most for tokenising a file; None where that cannot be asked."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_tokenise, args=(texts, tokenizer))
    process.start()
    peak = 0
    while process.is_alive():
        peak = max(peak, _resident(process.pid))
        process.join(0.02)
    return (peak or None) if process.exitcode == 0 else None


def _tokenise(texts: Path, tokenizer: str | Path) -> None:
    from etude.data.pretrain import prepare_pretrain
    from etude.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as cache:
        prepare_pretrain([str(texts)], Tokenizer(tokenizer), cache, val_fraction=0.0, workers=0)


def _resident(pid: int) -> int:
    """Bytes that a process and those it started hold, shared ones counted in each; 0 where there is no /proc."""
    from etude.memory import kibibytes

    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return kibibytes(f"/proc/{pid}/status").get("VmRSS", 0) + sum(_resident(int(child)) for child in children)


def step_seconds(config: DataBenchmark, folder: Path, tokenizer, store) -> tuple[str, dict[str, list[float]]]:
    """The device, and how long a step of each round took: ``reading`` its batch as training does, and with it ``there``."""
    from etude.data.batches import Batches, to_device
    from etude.data.pretrain import PretrainBlocks
    from etude.device import describe
    from etude.losses import causal_lm_loss
    from etude.training.config import PretrainConfig
    from etude.training.start import pretraining_model
    from etude.training.trainer import Trainer

    settings = PretrainConfig(
        output=str(folder / "run"), preset=config.preset, block_size=config.block_size, batch_size=config.batch_size,
        max_steps=10**6, device=config.device, compile="off" if config.quick else "auto",
    )  # fmt: skip
    batches = Batches(PretrainBlocks(store, config.block_size, tokenizer.pad_id), config.batch_size, seed=0)
    trainer = Trainer(settings, pretraining_model(settings, tokenizer), tokenizer, batches, causal_lm_loss)
    trainer.model.train()
    there = to_device(batches.at(0), trainer.device)
    count = config.steps or (4 if trainer.device.type == "cpu" else 20)

    def timed(steps: Callable[[], None]) -> float:
        wait(trainer.device)
        started = time.perf_counter()
        steps()
        wait(trainer.device)
        return (time.perf_counter() - started) / count

    def reading() -> None:
        with ThreadPoolExecutor(1) as loader:
            upcoming = loader.submit(batches.at, trainer.step)
            for _ in range(count):
                batch = upcoming.result()
                trainer.step += 1
                upcoming = loader.submit(batches.at, trainer.step)
                trainer.optimizer_step(batch)

    def having() -> None:
        for _ in range(count):
            trainer.optimizer_step(there)

    for steps in (reading, having):  # compiles, too
        steps()
    turns = {"reading": lambda: timed(reading), "there": lambda: timed(having)}
    return describe(trainer.device), in_turns(turns, config.rounds)


def sized(data: Sequence[str], size: int) -> list[str]:
    """Texts of about ``size`` bytes in all, of the files in ``data`` or of the sample corpus."""
    from itertools import cycle

    from etude.corpus.inputs import find_files
    from etude.corpus.jsonl import Rejects, read_texts
    from etude.corpus.sample.world import pretraining_documents

    own = (text for _, text in read_texts(find_files(data), Rejects(0)))
    sample = (record["text"] for record in pretraining_documents(seed=0))
    texts, held = [], 0
    for text in cycle(own if data else sample):
        if held >= size:
            return texts
        texts.append(text)
        held += len(text.encode())
    return texts


def write(texts: list[str], path: Path) -> None:
    import json

    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def trained(folder: Path, data: Sequence[str] = (), vocab_size: int = 16_384) -> Path:
    from etude.training.config import TokenizerConfig
    from etude.training.tokenizer import train

    train(
        TokenizerConfig(
            data=tuple(data) or (str(folder / "texts.jsonl"),),
            output=str(folder / "tokenizer"),
            vocab_size=vocab_size,
            max_bytes=10**7,
        )
    )
    return folder / "tokenizer"
