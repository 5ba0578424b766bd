"""Measure the way from text to batches, beside what the tokenizers library does with texts that lie in memory already.

MB are 10^6 bytes of UTF-8 text, on all cores; both take turns in one run.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from etude.benchmark.report import tell
from etude.cli import option
from etude.errors import UsageError


@dataclass(frozen=True)
class DataBenchmark:
    data: tuple[str, ...] = option((), "texts: .jsonl or .txt files; left out: the built-in sample")
    tokenizer: str = option("", "tokenizer folder; left out: one of 16,384 tokens is trained on the data")
    megabytes: int = option(40, "the data is repeated to so many MB, or cut to them")
    block_size: int = option(512, "tokens of a sequence")
    batch_size: int = option(64, "sequences of a batch")
    rounds: int = option(5, "rounds in which the two take turns; the medians count")
    quick: bool = option(False, "8 MB and three rounds: a minute on two CPU cores")
    output: str = option("", "also write the figures to this .json file")

    def __post_init__(self) -> None:
        for name in ("megabytes", "block_size", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least 1")


def data(config: DataBenchmark) -> None:
    """Compare, and print the figures."""
    megabytes, rounds = (8, 3) if config.quick else (config.megabytes, config.rounds)
    with tempfile.TemporaryDirectory(prefix="etude_benchmark_") as name:
        tell(compare(config, Path(name), megabytes * 10**6, rounds), config.output)


def compare(config: DataBenchmark, folder: Path, size: int, rounds: int) -> dict[str, object]:
    import tokenizers

    from etude.data.batches import Batches
    from etude.data.pretrain import PretrainBlocks, prepare_pretrain
    from etude.tokenizer import Tokenizer

    texts = sized(config.data, size)
    write(texts, folder / "texts.jsonl")
    tokenizer = Tokenizer(config.tokenizer or trained(folder))
    raw = tokenizers.Tokenizer.from_str(tokenizer.json)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rates: dict[str, list[float]] = {"etude": [], "tokenizers": []}
    for number in range(rounds):
        started = time.perf_counter()
        train, _ = prepare_pretrain(
            [str(folder / "texts.jsonl")], tokenizer, folder / f"cache{number}", val_fraction=0.0
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
    return {
        "text": f"{megabytes:.1f} MB, {len(texts):,} documents",
        "from file to store MB/s": round(medians["etude"], 2),
        "encode_batch_fast MB/s": round(medians["tokenizers"], 2),
        "ratio": round(medians["etude"] / medians["tokenizers"], 3),
        **{f"all {name}": [round(rate, 2) for rate in found] for name, found in rates.items()},
        "batches tokens/s": round(loaded),
    }


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
