"""Rows that occur twice, exactly or nearly, left out: of copies the first stays.

Exact copies are found by 128-bit hashes scattered over 256 files by their first byte, so that one file at a time is sorted in
memory: about 0.4 bytes a row there, 24 on the disk. Near-duplicates: see :mod:`etude.corpus.rows.near`. The input is read once to
hash it, once more to sign it if near-duplicates are sought, and once to copy what stays.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from etude.cli import option
from etude.corpus.inputs import inputs_of
from etude.corpus.jsonl import Rejects, parse_line
from etude.corpus.output import Output, reading, require_rows, summary
from etude.corpus.rows.documents import Batch, text_of
from etude.corpus.rows.external import Lines, Scatter, Verdicts, changes, each_row, job
from etude.corpus.rows.near import NearConfig, NearIndex, signatures, tell_near
from etude.corpus.workers import in_order
from etude.errors import DataError, UsageError

KEYS = ("text", "line")
NORMALISATIONS = ("case", "whitespace", "punctuation")
EXACT = 2.0  # stands for the similarity of exact copies, which a near-duplicate's estimate cannot reach


@dataclass(frozen=True)
class DedupConfig(NearConfig):
    output: str = option("", "file of the rows that stay, compressed by its ending, or - for standard output")
    key: str = option("text", "what makes two rows equal: text (--text_key's, or all that a conversation says), or line")
    normalise: tuple[str, ...] = option((), "differences that do not count: case, whitespace, punctuation (one or more)")
    near: bool = option(False, "leave out near-duplicates of an earlier row as well (needs rensa)")
    workers: int = option(0, "processes; 0: all cores")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key not in KEYS:
            raise UsageError(f"key ({self.key}) must be one of {', '.join(KEYS)}")
        for name in self.normalise:
            if name not in NORMALISATIONS:
                raise UsageError(f"normalise ({name}) must be one of {', '.join(NORMALISATIONS)}")
        if self.key == "line" and (self.near or self.normalise):
            raise UsageError("near and normalise look at texts; leave out --key line")


def dedup(config: DedupConfig) -> None:
    """Copy the rows of ``config.input`` but for copies of earlier ones; those go to the rejected file, with their model."""
    files = inputs_of(config.input)
    with job(config.output, files, config.force) as (output, scratch):
        lines, verdicts = Lines(files, scratch), Verdicts(scratch / "verdicts")
        _find_copies(lines, verdicts, output.rejects(config.max_bad), scratch, config)
        if config.near:
            index = index_of(lines, verdicts, scratch, config)
            for out, models, shares in index.copies():
                verdicts.add(out, models, shares)
            tell_near(config)
        _copy(lines, verdicts, output)
    summary(output, config.output)


class Hashed(NamedTuple):
    """What a worker found in a batch of lines, numbered from the first one of all."""

    lines: Any  # numbers of the rows, int64
    hashes: Any  # (rows, 2) uint64
    others: Any  # numbers of the blank and bad lines, int64
    problems: list[tuple[str, str, bytes]]  # (place, reason, line) of the bad ones


def _find_copies(lines: Lines, verdicts: Verdicts, rejects: Rejects, scratch: Path, config: DedupConfig) -> None:
    """Mark blank and bad lines as no rows, and exact copies with the line they are copies of."""
    import numpy as np

    scatter = Scatter(scratch / "hashes", [("hash", "u8", 2), ("line", "i8")])
    hash_batch = partial(_hash_batch, key=config.key, text_key=config.text_key, normalise=config.normalise)
    rows = 0
    with reading("hash", lines.files) as bar:
        for found in in_order(hash_batch, lines.batches(bar), config.workers):
            rows += len(found.lines)
            for problem in found.problems:
                rejects.add(*problem)
            verdicts.add(found.others, Verdicts.NO_ROW)
            scatter.add((found.hashes[:, 0] >> np.uint64(56)).astype(np.int64), hash=found.hashes, line=found.lines)
    require_rows(rows, lines.files, rejects.reasons)
    for part in range(256):
        records = scatter.load(part)
        records = records[np.lexsort((records["hash"][:, 1], records["hash"][:, 0]))]  # stable: equal ones stay in order
        new = changes(records["hash"])
        firsts = records["line"][np.flatnonzero(new)[np.cumsum(new) - 1]]
        verdicts.add(records["line"][~new], firsts[~new], EXACT)


def _hash_batch(item: tuple[int, Batch], key: str, text_key: str, normalise: tuple[str, ...]) -> Hashed:
    import numpy as np

    lines, hashes, others, problems = [], [], [], []
    for place, (number, offset, line) in enumerate(item[1].lines):
        try:
            bare, record = parse_line(line, offset)
            if record is None:
                others.append(place)
                continue
            content = bare if key == "line" else normalised(text_of(record, text_key), normalise).encode("utf-8")
        except DataError as error:
            others.append(place)
            problems.append((f"{item[1].path}:{number}", str(error), line.rstrip(b"\r\n")))
            continue
        lines.append(place)
        hashes.append(blake2b(content, digest_size=16).digest())
    pairs = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2)
    return Hashed(np.array(lines, np.int64) + item[0], pairs, np.array(others, np.int64) + item[0], problems)


def normalised(text: str, what: tuple[str, ...]) -> str:
    """``text`` without the differences named in ``what``: case, whitespace (how much, of what kind), punctuation and symbols."""
    if "case" in what:
        text = text.casefold()
    if "punctuation" in what:
        text = re.sub(r"[^\w\s]|_", "", text)
    if "whitespace" in what:
        text = " ".join(text.split())
    return text


def index_of(lines: Lines, verdicts: Verdicts, scratch: Path, config: Any) -> NearIndex:
    """The signatures of all lines that are rows and have no verdict yet."""
    index = NearIndex(scratch / "near", config.threshold, config.num_perm)
    sign_batch = partial(_sign_batch, text_key=config.text_key, ngram=config.ngram, num_perm=config.num_perm)

    def undecided(bar: Any) -> Iterator[tuple[int, Batch, Any]]:
        for first, batch in lines.batches(bar):
            found, _ = verdicts.of(first, len(batch.lines))
            yield first, batch, found == Verdicts.KEEP

    with reading("sign", lines.files) as bar:
        for numbers, signed in in_order(sign_batch, undecided(bar), config.workers):
            index.add(numbers, signed)
    index.finish()
    return index


def _sign_batch(item: tuple[int, Batch, Any], text_key: str, ngram: int, num_perm: int) -> tuple[Any, Any]:
    import numpy as np

    first, batch, wanted = item
    places = np.flatnonzero(wanted)
    texts = []
    for place in places.tolist():
        _, offset, line = batch.lines[place]
        texts.append(text_of(parse_line(line, offset)[1], text_key))
    numbers, signed = signatures(texts, ngram, num_perm)
    return places[numbers] + first, signed


def _copy(lines: Lines, verdicts: Verdicts, output: Output) -> None:
    """Write the lines that stay; set the copies aside."""

    def keep_or_reject(place: str, line: bytes, verdict: int, share: float) -> None:
        if verdict == Verdicts.KEEP:
            output.write_line(line)
        elif share == EXACT:
            output.reject(place, f"duplicate of {lines.place(verdict)}", line, kind="duplicate")
        else:
            output.reject(place, f"near-duplicate of {lines.place(verdict)} ({share:.2f})", line, kind="near-duplicate")

    each_row(lines, verdicts, "copy", keep_or_reject)
