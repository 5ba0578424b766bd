"""Rows as documents: one by one, or lines in batches for worker processes, and the text that counts and rules look at."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etude.corpus.conversations import to_messages
from etude.corpus.inputs import kind_of
from etude.corpus.jsonl import Rejects, Row, parse_line, raw_lines, read_rows, text_problem, unencodable
from etude.corpus.output import require_rows
from etude.errors import DataError, UsageError

BATCH_BYTES, BATCH_LINES = 2**20, 1024  # what a worker gets at once
CONVERSATION_KEYS = ("conversations", "messages", "instruction")


def rows_of(files: Sequence[Path], rejects: Rejects, bar: Any = None) -> Iterator[Row]:
    """The rows of JSONL files, one after the other. Raises :class:`DataError` if there is none."""
    count, bad_before = 0, len(rejects.reasons)
    for path in files:
        require_jsonl(path)
        for row in read_rows(path, rejects, bar):
            count += 1
            yield row
    require_rows(count, files, rejects.reasons[bad_before:])


def require_jsonl(path: Path) -> None:
    """Raise :class:`UsageError` for a file of another kind."""
    if kind_of(path) != ".jsonl":
        raise UsageError(f"{path}: expected .jsonl; make some of it with process_jsonl.py convert")


class Batch(NamedTuple):
    """Some lines of one file, as they stand there."""

    path: Path
    lines: list[tuple[int, int, bytes]]  # (number from 1, offset, bytes)
    broken: str = ""  # why the file cannot be read beyond these lines; "" if it can


def batches(files: Sequence[Path], bar: Any = None) -> Iterator[Batch]:
    """The lines of JSONL files. A file that breaks off ends with a batch that says so; the next file follows."""
    for path in files:
        require_jsonl(path)
        lines, size = [], 0
        try:
            for line in raw_lines(path, bar):
                lines.append(line)
                size += len(line[2])
                if size >= BATCH_BYTES or len(lines) == BATCH_LINES:
                    yield Batch(path, lines)
                    lines, size = [], 0
        except DataError as error:
            yield Batch(path, lines, str(error))
        else:
            if lines:
                yield Batch(path, lines)


class Parsed(NamedTuple):
    """A line that was read: its record, or the reason why it is none."""

    place: str  # "file:line"
    line: bytes  # without BOM and line end
    record: dict[str, Any]
    problem: str = ""


def parsed(batch: Batch) -> Iterator[Parsed]:
    """Each line of a batch that is not blank."""
    for number, offset, line in batch.lines:
        try:
            line, record = parse_line(line, offset)
        except DataError as error:
            yield Parsed(f"{batch.path}:{number}", line.rstrip(b"\r\n"), {}, str(error))
            continue
        if record is not None:
            yield Parsed(f"{batch.path}:{number}", line, record)


def is_conversation(record: dict[str, Any]) -> bool:
    """Whether a record has a key that conversations come under."""
    return any(key in record for key in CONVERSATION_KEYS)


def text_of(record: dict[str, Any], text_key: str) -> str:
    """A row's text; of a conversation, its contents, one below the other. Raises :class:`DataError` if it has neither."""
    text = record.get(text_key)
    if text is None and is_conversation(record):
        text = "\n".join(message["content"] for message in to_messages(record))
        problem = unencodable(text) if text.strip() else "the conversation has no words"
    else:
        problem = text_problem(text, text_key, record)
    if problem:
        raise DataError(problem)
    return text
