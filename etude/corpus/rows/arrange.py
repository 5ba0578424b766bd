"""Rows in another order, some of them, or of several inputs: shuffle, sample, merge. Lines are copied byte for byte."""

import heapq
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from etude.cli import option
from etude.corpus.inputs import find_files, inputs_of
from etude.corpus.jsonl import Rejects, Row
from etude.corpus.output import reading, require_rows, summary, tell
from etude.corpus.rows.documents import Parsed, parsed, rows_of
from etude.corpus.rows.external import Lines, job
from etude.corpus.rows.options import INPUT, JobConfig, numbers_of
from etude.corpus.streams import STANDARD_INPUT
from etude.errors import DataError, UsageError

# ---- shuffle ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShuffleConfig(JobConfig):
    memory: int = option(256, "MiB for the rows that are sorted at once; the result does not depend on it")
    seed: int = option(0, "seed of the order")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise UsageError(f"memory ({self.memory}) must be at least 1 MiB")


KEY_DIGITS = 16  # a row's place in the new order, a random number of 64 bits, in hexadecimal
FAN_OUT_BITS = 6  # 64 buckets, thus files open at once
ROW_BYTES = 64  # that Python needs for a row besides its bytes


def shuffle(config: ShuffleConfig) -> None:
    """Write the rows in random order, every order equally likely. The disk holds them twice for a while.

    Each row draws a random key; rows are scattered into buckets by the key's first bits, and each bucket is sorted.
    """
    files, source = inputs_of(config.input), random.Random(config.seed)
    with job(config.output, files, config.force) as (output, scratch), reading("shuffle", files) as bar:
        rows = rows_of(files, output.rejects(config.max_bad), bar)
        keyed = (b"%016x%b\n" % (source.getrandbits(64), row.line) for row in rows)
        for line in _sorted_lines(keyed, scratch / "0", 64 - FAN_OUT_BITS, config.memory * 2**20):
            output.write_line(line[KEY_DIGITS:-1])
    summary(output, config.output)


def _sorted_lines(lines: Iterable[bytes], folder: Path, shift: int, max_bytes: int) -> Iterator[bytes]:
    """Lines that begin with a key, in the keys' order. ``shift``: of the key, to the bits that name the bucket."""
    folder.mkdir()
    buckets = [folder / str(number) for number in range(2**FAN_OUT_BITS)]
    sizes = [0] * len(buckets)
    with ExitStack() as stack:
        files = [stack.enter_context(open(bucket, "wb")) for bucket in buckets]
        for line in lines:
            number = int(line[:KEY_DIGITS], 16) >> shift & 2**FAN_OUT_BITS - 1
            files[number].write(line)
            sizes[number] += len(line) + ROW_BYTES
    for bucket, size in zip(buckets, sizes, strict=True):
        with open(bucket, "rb") as file:
            if size <= max_bytes or shift < FAN_OUT_BITS:
                yield from sorted(file)
            else:
                yield from _sorted_lines(file, folder / f"{bucket.name}.parts", shift - FAN_OUT_BITS, max_bytes)
        bucket.unlink()


# ---- sample -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig(JobConfig):
    rows: int = option(0, "rows to take, exactly; 0: not by rows")
    bytes: int = option(0, "bytes to take, as near as rows allow, never more; 0: not by bytes")
    ratio: float = option(0.0, "chance of each row to be taken, from 0 to 1; 0: not by ratio")
    seed: int = option(0, "seed of the choice")

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(map(bool, (self.rows, self.bytes, self.ratio))) != 1:
            raise UsageError("say how much to take, by one of --rows, --bytes and --ratio")
        if self.rows < 0 or self.bytes < 0 or not 0 <= self.ratio <= 1:
            raise UsageError("rows and bytes must be above 0, ratio from 0 to 1")


def sample(config: SampleConfig) -> None:
    """Write a random choice of the rows, in the order in which they stand. By rows or bytes the input is read twice.

    Each row is taken with the chance wanted / left, both counted from it on: every set of that many rows is equally likely
    (D. Knuth, "The Art of Computer Programming", volume 2, 3.4.2, algorithm S).
    """
    files, source = inputs_of(config.input), random.Random(config.seed)
    with job(config.output, files, config.force) as (output, scratch):
        rejects = output.rejects(config.max_bad)
        if config.ratio:
            with reading("sample", files) as bar:
                for row in rows_of(files, rejects, bar):
                    if source.random() < config.ratio:
                        output.write_line(row.line)
        else:
            lines, wanted = Lines(files, scratch), config.rows or config.bytes
            left = sum(_size(row, config) for row in _rows(lines, rejects, "count"))
            require_rows(left, files, rejects.reasons)
            if wanted > left:
                tell(f"there are only {left:,} {'rows' if config.rows else 'bytes'}, not {wanted:,}: all are taken")
            for row in _rows(lines, Rejects(sys.maxsize), "sample"):
                size = _size(row, config)
                if size <= wanted and source.random() * left < wanted:
                    output.write_line(row.line)
                    wanted -= size
                left -= size
            if left:
                raise DataError("the input has changed while it was being read; run this again when nothing writes to it")
    summary(output, config.output)
    if not output.kept:
        tell("warning: no row was taken; ask for more")


def _rows(lines: Lines, rejects: Rejects, what: str) -> Iterator[Parsed]:
    with reading(what, lines.files) as bar:
        for _, batch in lines.batches(bar):
            for row in parsed(batch):
                if row.problem:
                    rejects.add(row.place, row.problem, row.line)
                else:
                    yield row


def _size(row: Parsed, config: SampleConfig) -> int:
    return 1 if config.rows else len(row.line) + 1


# ---- merge --------------------------------------------------------------------------------------------------------------

AT_THE_END = ("stop", "go_on", "repeat")


@dataclass(frozen=True)
class MergeConfig(JobConfig):
    input: tuple[str, ...] = option((), INPUT + "; with weights each name is one source")
    weights: tuple[str, ...] = option((), "share of each source, as 3,1; none: one after the other")
    by: str = option("rows", "what the weights are shares of: rows or bytes")
    when_short: str = option("stop", "when a source has no more rows: stop, go_on with the others, or repeat it")
    source_key: str = option("", "key to add to each row, with the name of its source; none: rows stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("rows", "bytes"):
            raise UsageError(f"by ({self.by}) must be rows or bytes")
        if self.when_short not in AT_THE_END:
            raise UsageError(f"when_short ({self.when_short}) must be one of {', '.join(AT_THE_END)}")
        if self.weights and len(weights := numbers_of("weights", self.weights)) != len(self.input):
            raise UsageError(f"{len(weights)} weights for {len(self.input)} inputs; give one for each")
        if self.when_short == "repeat" and not STANDARD_INPUT.isdisjoint(self.input):
            raise UsageError("standard input cannot be repeated; write it to a file first")


def merge(config: MergeConfig) -> None:
    """Write the rows of several inputs: mixed evenly by weight, or one input after the other."""
    sources = _sources(config.input)
    files = list(chain.from_iterable(sources))
    counts, sizes = [0] * len(sources), [0] * len(sources)
    ended: set[int] = set()  # sources that were read to their end
    with job(config.output, files, config.force) as (output, _), reading("merge", files) as bar:
        rejects = output.rejects(config.max_bad)

        def read(number: int, again: bool) -> Iterator[Row]:
            return rows_of(sources[number], Rejects(sys.maxsize) if again else rejects, bar)

        for number, row in _mixed(read, config, ended) if config.weights else _one_by_one(read, len(sources)):
            line = row.line
            if config.source_key:
                if config.source_key in row.record:
                    rejects.add(row.place, f"has a key {config.source_key!r} already", line)
                    continue
                line = _with_key(line, config.source_key, config.input[number], bool(row.record))
            output.write_line(line)
            counts[number] += 1
            sizes[number] += len(line) + 1
    summary(output, config.output)
    for name, rows, size in zip(config.input, counts, sizes, strict=True):
        share = f"{rows / max(1, output.kept):.2%} of the rows, {size / max(1, output.kept_bytes):.2%} of the bytes"
        tell(f"          {rows:>12,}  {share}, from {name}")
    if config.weights and (unread := [name for number, name in enumerate(config.input) if number not in ended]):
        tell(f"stopped   where a source had no more rows; some are left in {', '.join(unread)}")


def _sources(names: Sequence[str]) -> list[list[Path]]:
    """The files of each input. Raises :class:`UsageError` for one that is in two of them: its rows would count twice."""
    inputs_of(names)
    sources, seen = [find_files([name]) for name in names], set()
    for file in chain.from_iterable(sources):
        if file.resolve() in seen:
            raise UsageError(f"{file}: is named twice; name each file once, and give it more weight with --weights")
        seen.add(file.resolve())
    return sources


def _one_by_one(read: Callable[[int, bool], Iterator[Row]], sources: int) -> Iterator[tuple[int, Row]]:
    for number in range(sources):
        for row in read(number, False):
            yield number, row


def _mixed(read: Callable[[int, bool], Iterator[Row]], config: MergeConfig, ended: set[int]) -> Iterator[tuple[int, Row]]:
    """(source, row): next comes the source whose next row's middle is first on a scale of rows, or bytes, per weight.

    So up to any point of that scale each source has had its share, give or take half a row.
    """
    weights, by_rows = numbers_of("weights", config.weights), config.by == "rows"
    rows = [read(number, False) for number in range(len(weights))]
    ahead = [next(source, None) for source in rows]
    had = [0] * len(weights)

    def turn(number: int) -> tuple[float, int]:
        row = ahead[number]
        size = 0 if row is None else 1 if by_rows else len(row.line) + 1  # nothing more: its share ends here
        return (had[number] + size / 2) / weights[number], number

    turns = sorted(map(turn, range(len(weights))))
    while turns:
        number = turns[0][1]
        row = ahead[number]
        if row is None:  # its turn has come, and there is nothing: with "repeat" of the last source to end, with "stop" of any
            return
        yield number, row
        had[number] += 1 if by_rows else len(row.line) + 1
        ahead[number] = next(rows[number], None)
        if ahead[number] is None:
            the_last = len(ended | {number}) == len(weights) and number not in ended
            ended.add(number)
            if config.when_short == "go_on":
                heapq.heappop(turns)
                continue
            if config.when_short == "repeat" and not the_last:
                rows[number] = read(number, True)
                ahead[number] = next(rows[number], None)
        heapq.heapreplace(turns, turn(number))


def _with_key(line: bytes, key: str, value: str, others: bool) -> bytes:
    """The object on a line with one more key, at its end; the rest stays byte for byte."""
    pair = json.dumps({key: value}, ensure_ascii=False)[1:].encode("utf-8")
    return line.rstrip()[:-1].rstrip() + (b", " if others else b"") + pair
