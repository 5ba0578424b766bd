"""More rows than memory holds: temporary files beside the output, lines read again by number, records scattered by a key."""

import bisect
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from etude.corpus.output import Output, check_output, output_to, reading, require_kind
from etude.corpus.rows.documents import Batch, batches
from etude.corpus.streams import PIPE
from etude.errors import DataError
from etude.files import clear_leftovers


@contextmanager
def job(path: str, inputs: Sequence[Path], force: bool) -> Iterator[tuple[Output, Path]]:
    """An :class:`Output` into ``path``, as :func:`output_to` makes it, and a scratch folder on the same disk."""
    require_kind(path or "-", [".jsonl"])
    check_output(path, inputs, force)
    with scratch_beside(path) as scratch, output_to(path, inputs, force) as output:
        yield output, scratch


@contextmanager
def scratch_beside(path: str) -> Iterator[Path]:
    """A folder for temporary files beside the output ``path`` (for a pipe: where the system keeps such); it goes with the block.

    What a killed process left behind, the next one that writes to the same ``path`` removes.
    """
    target = _place_of(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", suffix=".tmp", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place_of(path: str) -> Path:
    return Path(tempfile.gettempdir()) / "etude_pipe" if Path(path) == PIPE else Path(path)


class Lines:
    """The lines of JSONL files, numbered from 0 through all of them, and read as often as needed.

    Standard input comes only once: the first reading copies it into ``scratch``.
    """

    def __init__(self, files: Sequence[Path], scratch: Path):
        self.files = files
        self._copy = scratch / "standard_input.jsonl"
        self._ends: list[int] = []  # the number after each file's last line, once all have been read

    def batches(self, bar: Any = None) -> Iterator[tuple[int, Batch]]:
        """(number of the first line, the batch). Raises :class:`DataError` for a damaged file or one that has changed."""
        start, ends = 0, []
        for file in self.files:
            first_time = not self._ends
            keep = open(self._copy, "wb") if file == PIPE and first_time else None
            with keep or contextlib.nullcontext():
                for batch in batches([file if file != PIPE or first_time else self._copy], bar):
                    if keep:
                        keep.writelines(line for _, _, line in batch.lines)
                    yield start, batch._replace(path=file)
                    if batch.broken:
                        raise DataError(batch.broken)
                    start += len(batch.lines)
            ends.append(start)
            if self._ends and start != self._ends[len(ends) - 1]:
                raise DataError(f"{file}: has changed while it was being read; run this again when nothing writes to it")
        self._ends = ends

    def place(self, number: int) -> str:
        """ "file:line" of a line, once all have been read."""
        file = bisect.bisect_right(self._ends, number)
        return f"{self.files[file]}:{number + 1 - (self._ends[file - 1] if file else 0)}"


class Scatter:
    """numpy records scattered over files by a number each, in the order in which they come.

    The way to sort or group what exceeds memory: records that belong together share a file, and a file fits. Nothing stays
    open between two writes; 8 MiB wait in memory.
    """

    WAITING_BYTES = 2**23

    def __init__(self, folder: Path, dtype: list[tuple]):
        import numpy as np

        folder.mkdir()
        self._folder, self.dtype = folder, np.dtype(dtype)
        self._waiting: list[tuple[Any, Any]] = []
        self._waiting_bytes = 0

    def add(self, parts: Any, **columns: Any) -> None:
        """Records given by their columns, each into the file with the number that ``parts`` (int64) says."""
        import numpy as np

        if not len(parts):
            return
        records = np.empty(len(parts), self.dtype)
        for name, column in columns.items():
            records[name] = column
        self._waiting.append((parts, records))
        self._waiting_bytes += parts.nbytes + records.nbytes
        if self._waiting_bytes > self.WAITING_BYTES:
            self._flush()

    def _flush(self) -> None:
        import numpy as np

        parts, records = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_bytes = [], 0
        order = np.argsort(parts, kind="stable")
        parts, records = parts[order], records[order]
        starts = np.flatnonzero(changes(parts)).tolist()
        for start, end in zip(starts, [*starts[1:], len(parts)], strict=True):
            with open(self._folder / str(parts[start]), "ab") as file:
                file.write(records[start:end].tobytes())

    def load(self, part: int) -> Any:
        """The records of one file."""
        import numpy as np

        if self._waiting:
            self._flush()
        file = self._folder / str(part)
        return np.fromfile(file, self.dtype) if file.exists() else np.empty(0, self.dtype)


def changes(values: Any) -> Any:
    """Where a row of an array differs from the one before it; the first does."""
    import numpy as np

    new = np.ones(len(values), bool)
    differ = values[1:] != values[:-1]
    new[1:] = differ.any(1) if values.ndim > 1 else differ
    return new


class Verdicts:
    """What is to become of each line: a whole number each, ``KEEP`` unless said otherwise, and a share beside it.

    Given in any order, asked for in the order of the lines; 20 bytes on the disk for each line that is not just kept.
    """

    KEEP, NO_ROW = -1, -2  # a line without a verdict; a blank or bad one
    RANGE = 2**20  # lines whose verdicts are in memory at once, 12 bytes each

    def __init__(self, folder: Path):
        self._scatter = Scatter(folder, [("line", "i8"), ("verdict", "i8"), ("share", "f4")])
        self._range: tuple[int, Any, Any] = (-1, None, None)

    def add(self, lines: Any, verdicts: Any, shares: Any = 0.0) -> None:
        """Arrays: lines' numbers, their verdicts, and a number each that a report may want."""
        self._range = (-1, None, None)
        self._scatter.add(lines // self.RANGE, line=lines, verdict=verdicts, share=shares)

    def of(self, first: int, count: int) -> tuple[Any, Any]:
        """(verdicts, shares) of ``count`` lines from number ``first`` on."""
        import numpy as np

        cuts = [first, *range((first // self.RANGE + 1) * self.RANGE, first + count, self.RANGE), first + count]
        pieces = []
        for start, end in pairwise(cuts):
            verdicts, shares = self._load(start // self.RANGE)
            begin = start % self.RANGE
            pieces.append((verdicts[begin : begin + end - start], shares[begin : begin + end - start]))
        return tuple(np.concatenate(column) for column in zip(*pieces, strict=True))

    def _load(self, number: int) -> tuple[Any, Any]:
        import numpy as np

        if number != self._range[0]:
            records = self._scatter.load(number)
            places = records["line"] - number * self.RANGE
            verdicts, shares = np.full(self.RANGE, self.KEEP, np.int64), np.zeros(self.RANGE, np.float32)
            verdicts[places], shares[places] = records["verdict"], records["share"]
            self._range = (number, verdicts, shares)
        return self._range[1:]


def each_row(lines: Lines, verdicts: Verdicts, what: str, do: Callable[[str, bytes, int, float], None]) -> None:
    """Call ``do`` with (place, line without BOM and line end, verdict, share) of each row, in order."""
    with reading(what, lines.files) as bar:
        for first, batch in lines.batches(bar):
            found, shares = verdicts.of(first, len(batch.lines))
            for (number, offset, line), verdict, share in zip(batch.lines, found.tolist(), shares.tolist(), strict=True):
                if verdict != Verdicts.NO_ROW:
                    line = line.rstrip(b"\r\n")
                    do(f"{batch.path}:{number}", line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line, verdict, share)
