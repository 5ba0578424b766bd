"""One input cut into several outputs: parts of so many rows or bytes, or shares that have no text in common."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from etude.cli import option
from etude.corpus.inputs import inputs_of
from etude.corpus.jsonl import parse_line
from etude.corpus.output import (
    Output,
    check_output,
    output_to,
    reading,
    rejected_beside,
    require_kind,
    require_rows,
    summary,
    tell,
)
from etude.corpus.rows.documents import Batch, rows_of, text_of
from etude.corpus.rows.external import Lines, Verdicts, each_row, scratch_beside
from etude.corpus.rows.near import NearConfig, NearIndex, signatures, tell_near
from etude.corpus.rows.options import numbers_of
from etude.corpus.workers import in_order
from etude.errors import DataError, UsageError
from etude.files import clear_leftovers

ALL_IN_ONE = 2**62  # bytes: no part ends by itself


@dataclass(frozen=True)
class SplitConfig(NearConfig):
    output: tuple[str, ...] = option((), "a file for each ratio (train.jsonl val.jsonl); for rows or bytes one folder")
    ratios: tuple[str, ...] = option((), "share of each output, as 0.98,0.01,0.01")
    rows: int = option(0, "rows in a part; 0: not by rows")
    bytes: int = option(0, "bytes in a part, before any compression; 0: not by bytes")
    text_key: str = option("text", "by ratio: key of a row's text; equal texts go to one output")
    near: bool = option(False, "by ratio: near-duplicates, too, go to one output (needs rensa)")
    seed: int = option(0, "by ratio: seed of the choice")
    force: bool = option(False, "overwrite the outputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(map(bool, (self.ratios, self.rows, self.bytes))) != 1 or self.rows < 0 or self.bytes < 0:
            raise UsageError("say how to split, by one of --ratios, --rows and --bytes")
        expected = len(numbers_of("ratios", self.ratios)) if self.ratios else 1
        if len(self.output) != expected:
            what = "a file for each ratio" if self.ratios else "one folder"
            raise UsageError(f"output names {len(self.output)}, expected {expected}: {what}")
        if len({str(Path(name).absolute()) for name in self.output}) < expected or (self.ratios and "-" in self.output):
            raise UsageError(f"outputs ({' '.join(self.output)}) must be different files")
        if self.near and not self.ratios:
            raise UsageError("near goes with ratios; parts of so many rows or bytes follow the input's order")


def split(config: SplitConfig) -> None:
    """Cut the input into parts of so many rows or bytes, or deal it out by ratio; the order within an output stays.

    By ratio a hash of a row's text decides, so copies never stand on both sides, and a row keeps its side when others come
    or go. With ``near`` the first row of a group of near-duplicates decides for the whole group.
    """
    files = inputs_of(config.input)
    if not config.ratios:
        _cut(files, config)
        return
    shares = numbers_of("ratios", config.ratios)
    limits = [upper / sum(shares) for upper in accumulate(shares)][:-1]
    with _outputs(config.output, files, config.force) as outputs:
        (_deal_groups if config.near else _deal)(files, outputs, limits, config)
    rows = sum(output.kept for output in outputs)
    for output, name in zip(outputs, config.output, strict=True):
        summary(output, name)
        tell(f"          {output.kept / max(1, rows):.3%} of the rows")


@contextmanager
def _outputs(names: Sequence[str], inputs: Sequence[Path], force: bool) -> Iterator[list[Output]]:
    """An :class:`Output` for each name. All appear when the block ends well, else none; rejected rows go to the first's."""
    if rejected_beside(names[0]) in names:
        raise UsageError(f"{rejected_beside(names[0])}: is where rejected rows go; choose another --output")
    for name in names:
        require_kind(name, [".jsonl"])
        check_output(name, inputs, force)
        clear_leftovers(name)
    with ExitStack() as stack:
        outputs = [stack.enter_context(output_to(name, inputs, force)) for name in names]
        yield outputs
        for output in outputs:
            output.close()  # a full disk shows here, before the first of them takes its name


def _cut(files: Sequence[Path], config: SplitConfig) -> None:
    (name,) = config.output
    check_output(name, files, config.force, folder=True)
    clear_leftovers(name)
    with (
        output_to(name, files, config.force, shard_bytes=config.bytes or ALL_IN_ONE) as output,
        reading("split", files) as bar,
    ):
        for number, row in enumerate(rows_of(files, output.rejects(config.max_bad), bar)):
            if config.rows and number and number % config.rows == 0:
                output.next_shard()
            output.write_line(row.line)
    summary(output, name)


def _deal(files: Sequence[Path], outputs: list[Output], limits: list[float], config: SplitConfig) -> None:
    rejects = outputs[0].rejects(config.max_bad)
    with reading("split", files) as bar:
        for row in rows_of(files, rejects, bar):
            try:
                part = part_of(text_of(row.record, config.text_key), config.seed, limits)
            except DataError as error:
                rejects.add(row.place, str(error), row.line)
                continue
            outputs[part].write_line(row.line)
    require_rows(sum(output.kept for output in outputs), files, rejects.reasons)


def part_of(text: str, seed: int, limits: list[float]) -> int:
    """Which output a text belongs to: a hash of it as a number from 0 to 1, on a scale cut at ``limits``."""
    digest = blake2b(text.encode("utf-8"), digest_size=8, key=f"{seed}".encode()).digest()
    return bisect_right(limits, int.from_bytes(digest, "big") / 2**64)


class Dealt(NamedTuple):
    """What a worker found in a batch of lines, numbered from the first one of all."""

    lines: Any  # numbers of the rows, int64
    parts: Any  # the output that each row's own text says, int64
    signed: Any  # which of the rows have words, thus a signature: places in ``lines``
    signatures: Any
    others: Any  # numbers of the blank and bad lines, int64
    problems: list[tuple[str, str, bytes]]  # (place, reason, line) of the bad ones


def _deal_groups(files: Sequence[Path], outputs: list[Output], limits: list[float], config: SplitConfig) -> None:
    """Sign all rows, then copy them, each to where the first of its group goes."""
    import numpy as np

    rejects, rows = outputs[0].rejects(config.max_bad), 0
    deal_batch = partial(_deal_batch, config=config, limits=limits)
    with scratch_beside(config.output[0]) as scratch:
        lines, verdicts = Lines(files, scratch), Verdicts(scratch / "verdicts")
        index = NearIndex(scratch / "near", config.threshold, config.num_perm)
        parts = [np.empty(0, np.uint16)]  # of the rows in the index: 2 bytes each
        with reading("sign", files) as bar:
            for dealt in in_order(deal_batch, lines.batches(bar), config.workers):
                for problem in dealt.problems:
                    rejects.add(*problem)
                verdicts.add(dealt.others, Verdicts.NO_ROW)
                verdicts.add(dealt.lines, dealt.parts)
                index.add(dealt.lines[dealt.signed], dealt.signatures)
                parts.append(dealt.parts[dealt.signed].astype(np.uint16))
                rows += len(dealt.lines)
        require_rows(rows, files, rejects.reasons)
        index.finish()
        firsts, members = index.groups().members()
        verdicts.add(index.lines()[members], np.concatenate(parts)[firsts])  # of two verdicts on a line the later one counts
        tell_near(config)
        each_row(lines, verdicts, "copy", lambda place, line, part, number: outputs[part].write_line(line))


def _deal_batch(item: tuple[int, Batch], config: SplitConfig, limits: list[float]) -> Dealt:
    import numpy as np

    first, batch = item
    lines, texts, others, problems = [], [], [], []
    for place, (number, offset, line) in enumerate(batch.lines):
        try:
            _, record = parse_line(line, offset)
            text = text_of(record, config.text_key) if record is not None else None
        except DataError as error:
            problems.append((f"{batch.path}:{number}", str(error), line.rstrip(b"\r\n")))
            text = None
        if text is None:
            others.append(place)
        else:
            lines.append(place)
            texts.append(text)
    parts = [part_of(text, config.seed, limits) for text in texts]
    lines, parts, others = (np.array(numbers, np.int64) for numbers in (lines, parts, others))
    return Dealt(lines + first, parts, *signatures(texts, config.ngram, config.num_perm), others + first, problems)
