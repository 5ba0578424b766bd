"""Rows as documents: lines in batches for worker processes, and the text that counts and rules look at."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etude.corpus.conversations import to_messages
from etude.corpus.jsonl import kind_of, parse_line, raw_lines, text_problem, unencodable
from etude.errors import DataError, UsageError

BATCH_BYTES, BATCH_LINES = 2**20, 1024  # what a worker gets at once
CONVERSATION_KEYS = ("conversations", "messages", "instruction")


class Batch(NamedTuple):
    """Some lines of one file, as they stand there."""

    path: Path
    lines: list[tuple[int, int, bytes]]  # (number from 1, offset, bytes)
    broken: str = ""  # why the file cannot be read beyond these lines; "" if it can


def batches(files: Sequence[Path], bar: Any = None) -> Iterator[Batch]:
    """The lines of JSONL files. A file that breaks off ends with a batch that says so; the next file follows."""
    for path in files:
        if kind_of(path) != ".jsonl":
            raise UsageError(f"{path}: expected .jsonl; make some of it with process_jsonl.py convert")
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


def as_line(record: dict[str, Any]) -> bytes:
    """A record as a line. Raises :class:`DataError` for what JSON or UTF-8 does not have: dates, bytes, NaN, half characters."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot be written as JSON ({error}); leave such keys out (convert --drop_keys)") from None


def require_rows(rows: int, files: Sequence[Path]) -> None:
    """Raise :class:`DataError` where an input has no row at all: that is a mistake, not an empty result."""
    if not rows:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise DataError(f"{', '.join(map(str, files[:3]))}{more}: no row in it; check the input")
