"""Measure the corpus tools as a person runs them: whole processes, beside wikiextractor and raw library rates, in one run.

Figures are MB (10^6 bytes) of uncompressed input a second of wall time, and the peak resident memory of the largest process.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from etude import paths
from etude.benchmark.report import tell
from etude.cli import option
from etude.corpus.streams import open_binary
from etude.errors import DataError, UsageError

TOOLS = Path(__file__).resolve().parents[2] / "tool"


@dataclass(frozen=True)
class CorpusBenchmark:
    dump: str = option("", "a MediaWiki dump (.xml, .bz2, …) whose pages are repeated to --megabytes; left out: no extraction")
    data: str = option("", "a .jsonl file of texts, repeated to --megabytes; left out: the built-in sample")
    megabytes: int = option(150, "input of each tool, in MB")
    memory_megabytes: int = option(0, "also run on so many MB, to see whether memory grows; 0: no")
    rounds: int = option(3, "rounds in which the programs take turns; the medians count")
    workers: int = option(0, "processes that extract; 0: all cores. The JSONL tools are measured on one")
    wikiextractor: str = option("wikiextractor", "the program to compare with (pip install wikiextractor==3.1.0)")
    quick: bool = option(False, "10 MB and one round: a minute on two CPU cores")
    output: str = option("", "also write the figures to this .json file")

    def __post_init__(self) -> None:
        for name in ("megabytes", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least 1")


def corpus(config: CorpusBenchmark) -> None:
    """Run every tool in turns, and print the figures."""
    megabytes, rounds = (10, 1) if config.quick else (config.megabytes, config.rounds)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="etude_benchmark_") as name:
        folder = Path(name)
        if config.dump:
            dump = repeat_dump(Path(config.dump), folder / "dump.xml", megabytes)
            figures |= compare(extractors(config, dump, folder), dump.stat().st_size, rounds)
        rows = repeat_rows(config.data, folder / "rows.jsonl", megabytes)
        figures |= compare(row_tools(rows, folder), rows.stat().st_size, rounds)
        if config.memory_megabytes:
            figures |= memory(
                ("check", "merge", "filter", "shuffle", "dedup"), folder, (10, config.memory_megabytes), config.data
            )
    tell(figures, config.output)


def extractors(config: CorpusBenchmark, dump: Path, folder: Path) -> dict[str, Callable[[], int]]:
    out, workers = folder / "pages.jsonl", config.workers or os.cpu_count() or 1
    ours = [sys.executable, str(TOOLS / "extract_xml.py"), "--input", str(dump), "--output", str(out), "--force"]
    programs = {"extract_xml": lambda: peak_memory([*ours, "--workers", str(workers)])}
    if which(config.wikiextractor):
        theirs = [
            config.wikiextractor,
            str(dump),
            "--json",
            "--quiet",
            "--processes",
            str(workers),
            "-o",
            str(folder / "theirs"),
        ]
        programs["wikiextractor"] = lambda: peak_memory(theirs)
    else:
        print(
            f"{config.wikiextractor}: not found, so nothing to compare with; pip install wikiextractor==3.1.0", file=sys.stderr
        )
    return programs


def row_tools(rows: Path, folder: Path) -> dict[str, Callable[[], int]]:
    return {
        **{
            tool: lambda tool=tool: peak_memory(command(tool, rows, folder))
            for tool in ("check", "merge", "filter", "dedup", "shuffle")
        },
        "json.loads of each line": lambda: peak_memory([sys.executable, "-c", RAW_READING, "json", str(rows)]),
        "orjson.loads of each line": lambda: peak_memory([sys.executable, "-c", RAW_READING, "orjson", str(rows)]),
    }


RAW_READING = "import importlib, sys; loads = importlib.import_module(sys.argv[1]).loads\nfor line in open(sys.argv[2], 'rb'): loads(line)"


def command(tool: str, rows: Path, folder: Path) -> list[str]:
    """The command line of a JSONL tool, on one core."""
    output = ["--output", str(folder / "out.jsonl"), "--force"]
    options = {
        "check": ["--workers", "1"],
        "merge": output,
        "filter": [*output, "--workers", "1", "--rules", "gopher"],
        "dedup": output,
        "shuffle": output,
    }
    return [sys.executable, str(TOOLS / "process_jsonl.py"), tool, "--input", str(rows), *options[tool]]


def compare(programs: dict[str, Callable[[], int]], size: int, rounds: int) -> dict[str, object]:
    """MB/s and peak MiB of each, in turns, so that a machine whose speed drifts is fair to all."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    peaks = dict.fromkeys(programs, 0)
    for _ in range(rounds):
        for name, program in programs.items():
            started = time.perf_counter()
            peaks[name] = max(peaks[name], program())
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: f"{size / 1e6 / medians[name]:7.1f} MB/s  {medians[name]:6.1f} s for {size / 1e6:.0f} MB"
        + (f"  {peaks[name] / 2**20:.0f} MiB" if peaks[name] else "")
        for name in programs
    }


# A small process between, since a child's peak begins with that of the process it was forked from.
WATCHING = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(code)"""


def peak_memory(arguments: list[str]) -> int:
    """Run a program to its end; the peak resident memory of its largest process in bytes (0 on Windows, which doesn't tell)."""
    watched = os.name != "nt"
    command = [sys.executable, "-c", WATCHING, *arguments] if watched else arguments
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip()[-500:]
        raise DataError(f"{' '.join(arguments)} ended with {done.returncode}: {told}")
    return int(done.stdout) if watched else 0


def memory(tools: tuple[str, ...], folder: Path, sizes: tuple[int, ...], data: str) -> dict[str, object]:
    """Peak MiB of the tools on inputs of ``sizes`` MB."""
    found: dict[str, list[str]] = {tool: [] for tool in tools}
    for size in sizes:
        rows = repeat_rows(data, folder / "grown.jsonl", size)
        for tool in tools:
            found[tool].append(f"{peak_memory(command(tool, rows, folder)) / 2**20:.0f} at {size} MB")
    return {f"{tool}, peak MiB": ", ".join(values) for tool, values in found.items()}


def repeat_rows(data: str, target: Path, megabytes: int) -> Path:
    """Rows of a JSONL file, or of the built-in sample, again and again with a number of their own."""
    import json

    source = Path(data) if data else target.with_name("sample") / "pretrain" / "pretrain_hq.jsonl"
    if not data and not source.exists():
        from etude.corpus.sample.world import write_sample

        write_sample(str(target.with_name("sample")), 0)
    written = number = 0
    with open(target, "wb") as file:
        while written < megabytes * 1_000_000:
            before = written
            with open_binary(source) as lines:
                for line in lines:
                    record = json.loads(line)
                    record["text"] = f"{number} {record['text']}"
                    written += file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    number += 1
                    if written >= megabytes * 1_000_000:
                        break
            if written == before:
                raise DataError(f"{source}: has no rows; name another --data")
    return target


def repeat_dump(source: Path, target: Path, megabytes: int) -> Path:
    """The pages of a small UTF-8 dump again and again, each with an id and a title of its own, as one large dump."""
    with open_binary(source) as file:
        whole = file.read()
    begin, end = whole.find(b"<page>"), whole.rfind(b"</page>") + len(b"</page>")
    if begin < 0:
        raise DataError(f"{paths.typed(source)}: holds no <page> in UTF-8; name another --dump")
    with open(target, "wb") as out:
        out.write(whole[:begin])
        for page in _numbered(whole[begin:end].split(b"</page>")[:-1]):
            out.write(page)
            if out.tell() >= megabytes * 1_000_000:
                break
        out.write(whole[end:])
    return target


def _numbered(pages: list[bytes]) -> Iterator[bytes]:
    number = 0
    while True:
        for page in pages:
            number += 1
            title = page.replace(b"</title>", b" (%d)</title>" % number, 1)
            before, _, after = title.partition(b"<id>")
            yield before + b"<id>%d" % number + after[after.index(b"</id>") :] + b"</page>"
