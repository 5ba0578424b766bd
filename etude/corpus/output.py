"""Where a corpus tool's records go: one file, a folder of shards, or a pipe; whole or not at all, with what was rejected beside.

What a tool writes, the next one and the training stages read.
"""

import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from etude import paths
from etude.corpus.inputs import REJECTED, kind_of
from etude.corpus.jsonl import Rejects, as_line
from etude.corpus.streams import COMPRESSED_SUFFIXES, PIPE, create_binary, standard_output
from etude.errors import DataError, StorageError, UsageError
from etude.files import clear_leftovers, whole_file, whole_folder
from etude.runlog import progress_bar

SHARD = re.compile(r"\d{5,}\.jsonl|\..*")  # what a folder of shards may hold when it is overwritten; hidden files too
SHARD_DIGITS = 5  # of a shard's number; more where there are more shards, so that their names sort as their numbers


class Output:
    """The records that a tool keeps, and those that it does not. Made by :func:`output_to`."""

    def __init__(self, open_shard: Callable[[int], IO[bytes]], shard_bytes: int, open_rejected: Callable[[], IO[bytes]] | None):
        self.kept = self.kept_bytes = 0  # rows, and bytes of their lines
        self.reasons: Counter[str] = Counter()  # rejected rows by reason
        self.examples: list[str] = []  # the first of them, where no file keeps them
        self._open_shard, self._shard_bytes, self.shards = open_shard, shard_bytes, 0
        self._file: IO[bytes] | None = None
        self._room = 0
        self._open_rejected, self._rejected = open_rejected, None

    def write_line(self, line: bytes) -> None:
        """Keep a row as it stood: without its line end."""
        if self._file is None or (self._shard_bytes and len(line) + 1 > self._room < self._shard_bytes):
            self.next_shard()
        self._file.write(line)
        self._file.write(b"\n")
        self._room -= len(line) + 1
        self.kept += 1
        self.kept_bytes += len(line) + 1

    def write(self, record: dict[str, Any]) -> None:
        """Keep a record."""
        self.write_line(as_line(record))

    def reject(self, place: str, reason: str, line: bytes, kind: str = "") -> None:
        """Set a row aside, with its reason; counted under ``kind``, by default the reason itself."""
        self.reasons[kind or reason] += 1
        if self._open_rejected is None and len(self.examples) < 5:
            self.examples.append(f"{place}: {reason}")
        if self._open_rejected is not None:
            if self._rejected is None:
                self._rejected = self._open_rejected()
            # A line that is no UTF-8 has its odd bytes shown as \xNN; the place tells where they are.
            text = line.decode("utf-8", errors="backslashreplace")
            self._rejected.write(as_line({"place": place, "reason": reason, "line": text}) + b"\n")

    def rejects(self, max_bad: int) -> Rejects:
        """For reading: bad records, within ``max_bad``, are set aside here like others."""
        return Rejects(max_bad, keep=lambda place, reason, line: self.reject(place, reason, line, kind="bad record"))

    def next_shard(self) -> None:
        """Let the next row begin another file; only where the output is a folder."""
        if self._file is not None:
            self._file.close()
        self._file = self._open_shard(self.shards)
        self.shards += 1
        self._room = self._shard_bytes

    def close(self) -> None:
        if self._file is None:
            self.next_shard()  # no row at all is an empty file, not a missing one
        self._file.close() if self._file is not sys.stdout.buffer else self._file.flush()
        if self._rejected is not None:
            self._rejected.close()


@contextmanager
def output_to(
    path: str,
    inputs: Sequence[Path] = (),
    force: bool = False,
    shard_bytes: int = 0,
    rejected: str = "",
    create: Callable[[Path, Path], IO[bytes]] = create_binary,
) -> Iterator[Output]:
    """An :class:`Output` into the file ``path``, compressed by its suffix, or into standard output (``-``).

    With ``shard_bytes`` ``path`` is a folder, of files ``00000.jsonl``, … of about so many bytes before compression.
    Rejected rows go to ``rejected``, by default NAME.rejected.jsonl beside the output (none beside a pipe). All of it appears
    when the block ends well. Raises :class:`UsageError` if ``path`` exists, unless ``force``, or is one of the inputs.
    ``create(path, like)`` opens the file for the rows, as :func:`create_binary` does.
    """
    check_output(path, inputs, force, folder=bool(shard_bytes))
    target = Path(path)
    rejected_path = Path(rejected or rejected_beside(path)) if rejected or target != PIPE else None
    if rejected_path is not None:
        check_output(str(rejected_path), inputs, force)
    for mine in (target, rejected_path):
        if mine is not None and mine != PIPE:
            clear_leftovers(mine)
    with ExitStack() as stack:
        if target == PIPE:
            if shard_bytes:
                raise UsageError("a pipe has no shards; name a folder with --output")
            stack.enter_context(standard_output())
            open_shard = lambda number: sys.stdout.buffer  # noqa: E731
        elif shard_bytes:
            folder = stack.enter_context(whole_folder(target))
            open_shard = lambda number: create_binary(folder / shard_name(number), Path("x.jsonl"))  # noqa: E731
        else:
            temporary = stack.enter_context(whole_file(target))
            open_shard = lambda number: create(temporary, target)  # noqa: E731
        open_rejected = None
        if rejected_path is not None:

            def open_rejected() -> IO[bytes]:
                return create_binary(stack.enter_context(whole_file(rejected_path)), rejected_path)

        output = Output(open_shard, shard_bytes, open_rejected)
        try:
            yield output
        except BaseException:
            _close_quietly(output)
            raise
        output.close()
        if output.shards > 10**SHARD_DIGITS:  # in a folder, then
            for number in range(output.shards):
                (folder / shard_name(number)).rename(folder / shard_name(number, len(str(output.shards - 1))))
    if rejected_path is not None and output._rejected is None:
        rejected_path.unlink(missing_ok=True)  # an earlier run's: it would not belong to this output


def shard_name(number: int, digits: int = 0) -> str:
    return f"{number:0{digits or SHARD_DIGITS}}.jsonl"


def _close_quietly(output: Output) -> None:
    for file in (output._file, output._rejected):
        if file is not None and file is not sys.stdout.buffer:
            with contextlib.suppress(OSError):  # the disk is full: the error on its way says so
                file.close()


def rejected_beside(path: str) -> str:
    """Where rejected rows go that belong to the output ``path``."""
    return f"{path}{REJECTED}"


def check_output(path: str, inputs: Sequence[Path] = (), force: bool = False, folder: bool = False) -> None:
    """Raise :class:`UsageError` where writing to ``path``, a file or a ``folder`` of shards, would lose something or cannot work."""
    if not path:
        raise UsageError("name an --output (- is standard output)")
    if "\0" in path:
        raise UsageError(f"output ({path!r}) holds a zero byte, which no path can")
    target = Path(path)
    if target == PIPE:
        return
    for file in inputs:
        if file != PIPE and target.exists() and os.path.samefile(file, target):
            raise UsageError(f"{path}: is an input as well; choose another --output")
        if target.is_dir() and target.resolve() in file.resolve().parents:
            raise UsageError(f"{path}: holds the input {file}; choose another --output")
    if target.is_dir() and not folder:
        raise UsageError(f"{path}: is a folder; name a file in it")
    if target.exists() and not target.is_file() and not target.is_dir():
        raise UsageError(f"{path}: is no ordinary file, and would be replaced by one; write to - and redirect it there")
    if (target.exists() or target.is_symlink()) and not force:
        raise UsageError(f"{path}: exists already; choose another --output, or overwrite it with --force")
    if target.is_dir() and (others := sorted(file.name for file in target.iterdir() if not SHARD.fullmatch(file.name))):
        raise UsageError(f"{path}: holds other things than shards ({others[0]}), which would be lost; choose another --output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{target.parent}: this folder cannot be made ({error.strerror}); choose another --output") from None


def require_kind(path: str, kinds: Sequence[str]) -> None:
    """Raise :class:`UsageError` unless a file to be written has one of these endings (below .gz, .zst, …)."""
    if Path(path) != PIPE and kind_of(Path(path)) not in kinds:
        packed = " ".join(sorted(COMPRESSED_SUFFIXES))
        raise UsageError(f"output ({path}) must end in {' or '.join(kinds)} (then maybe {packed}), or be -")


@contextmanager
def reading(what: str, files: Sequence[Path]) -> Iterator[Any]:
    """A progress bar over the bytes of ``files`` as they lie on the disk; pass it to what reads them."""
    total = 0 if PIPE in files else sum(file.stat().st_size for file in files)
    with progress_bar(what, total, "B") as bar:
        yield bar


def require_rows(rows: int, files: Sequence[Path], bad: Sequence[str] = (), what: str = "row") -> None:
    """Raise :class:`DataError` where no row of the input could be read: that is a mistake, not an empty result.

    ``bad``: "file:line: reason" of each that could not; ``what`` a row is called.
    """
    if rows:
        return
    if bad:
        raise DataError(f"{bad[0]}; no {what} of the input is good ({len(bad):,} bad)")
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    raise DataError(f"{', '.join(map(str, files[:3]))}{more}: no {what} in it; check the input")


def tell(line: str) -> None:
    """Say something to the person: on standard error, since standard output may carry records."""
    print(line, file=sys.stderr, flush=True)


def summary(output: Output, path: str) -> None:
    """Tell what was kept and what was not, and why."""
    rejected = sum(output.reasons.values())
    tell(
        f"kept      {output.kept:,} rows, {output.kept_bytes:,} bytes → {'standard output' if path == '-' else paths.typed(path)}"
    )
    if rejected:
        where = f" → {paths.typed(path)}.rejected.jsonl" if path != "-" else ""
        tell(f"left out  {rejected:,} rows{where}")
        for reason, count in output.reasons.most_common():
            tell(f"          {count:>12,}  {reason}")
        for example in output.examples:
            tell(f"          {example}")
