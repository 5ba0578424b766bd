"""Text and JSON records in and out, with ``file:line`` on every complaint.

Reads .jsonl and .txt, also compressed (.gz .bz2 .xz .zst), file by file and line by line, so memory does not grow with
the input. Nothing is dropped silently: a bad record is an error, or, within ``max_bad``, counted, listed and kept aside.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from etude.corpus.inputs import kind_of
from etude.corpus.streams import open_binary
from etude.errors import DataError
from etude.files import whole_file

try:
    import orjson
except ImportError:  # an extra; the standard library reads the same records, more slowly
    orjson = None

MAX_LINE_BYTES = 64 * 2**20  # one line is held in memory; a longer one is no record but a mistake


@dataclass
class Rejects:
    """Counts the bad records of a job, and ends it at the first one above ``max_bad``.

    ``keep``, if given, is called with (place, reason, the line's bytes) of each, so that nothing is lost.
    """

    max_bad: int = 0
    reasons: list[str] = field(default_factory=list)  # "file:line: reason", one a rejected record
    keep: Callable[[str, str, bytes], None] | None = None

    def add(self, place: str, reason: str, line: bytes = b"") -> None:
        self.reasons.append(f"{place}: {reason}")
        if self.keep is not None:
            self.keep(place, reason, line)
        if len(self.reasons) > self.max_bad:
            allowed = f" (more than the {self.max_bad} that --max_bad allows)" if self.max_bad else ""
            raise DataError(f"{place}: {reason}{allowed}; mend the record, or let some go with --max_bad N")

    def summary(self) -> str:
        """A line for people; "" when nothing was rejected."""
        if not self.reasons:
            return ""
        shown = "".join(f"\n  {reason}" for reason in self.reasons[:5])
        more = f"\n  … and {len(self.reasons) - 5} more" if len(self.reasons) > 5 else ""
        return f"skipped {len(self.reasons)} bad records (--max_bad {self.max_bad}):{shown}{more}"


class Row(NamedTuple):
    """A record, and the line it stands on."""

    place: str  # "file:line"
    line: bytes  # as it stands there, without its line end
    record: dict[str, Any]


def raw_lines(path: Path, bar: Any = None) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset, bytes) of each line. Raises :class:`DataError` for a damaged archive or an endless line."""
    number, offset = 0, 0
    with open_binary(path, bar) as file:
        while True:
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
            except (OSError, EOFError, ValueError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut short ({error})") from None
            except Exception as error:  # lzma and zstd have error classes of their own
                raise DataError(f"{path}:{number + 1}: the compressed file is damaged or cut short ({error})") from None
            if not line:
                return
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; split it first")
            yield number, offset, line
            offset += len(line)


def _decode(line: bytes, offset: int) -> str:
    """A line's text without BOM and line end. Raises :class:`DataError` with the reason, without file and line."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at offset {offset + error.start}); "
            "convert the file to UTF-8 first (tool/split_text.py does)"
        ) from None
    return (text.removeprefix("\ufeff") if offset == 0 else text).rstrip("\r\n")


def read_lines(path: Path, bar: Any = None) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end) of each line of a UTF-8 file, a leading BOM aside.

    Raises :class:`DataError` with file:line for a byte that is no UTF-8, a damaged archive or an endless line.
    """
    for number, offset, line in raw_lines(path, bar):
        try:
            yield number, _decode(line, offset)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None


def read_rows(path: Path, rejects: Rejects, bar: Any = None) -> Iterator[Row]:
    """The rows of a JSONL file; blank lines are none. What only selects rows can copy their lines byte for byte."""
    name = str(path)  # once: a row takes microseconds
    for number, offset, line in raw_lines(path, bar):
        try:
            line, record = parse_line(line, offset)
        except DataError as error:
            rejects.add(f"{name}:{number}", str(error), line.rstrip(b"\r\n"))
            continue
        if record is not None:
            yield Row(f"{name}:{number}", line, record)


def parse_line(line: bytes, offset: int) -> tuple[bytes, dict[str, Any] | None]:
    """A line without BOM and line end, and its record; None if it is blank. ``offset``: where in the file it begins.

    Raises :class:`DataError` with the reason, without file and line.
    """
    line = line.rstrip(b"\r\n")
    if offset == 0:
        line = line.removeprefix(b"\xef\xbb\xbf")
    record = _parse_fast(line)
    if record is None:
        text = _decode(line, offset)
        record = parse_object(text) if text.strip() else None
    return line, record


def _parse_fast(line: bytes) -> dict[str, Any] | None:
    """The object on a line, read by orjson, or None where :func:`parse_object` has to decide.

    orjson takes the last of two equal keys without a word. It cannot have happened if the line holds as many colons after
    quotes as there are keys in the object, and no key whose colon stands apart, which that count would miss.
    """
    if orjson is None:
        return None
    try:
        record = orjson.loads(line)
    except ValueError:
        return None
    try:
        keys = _count_keys(record) if type(record) is dict else -1
    except RecursionError:
        return None
    if line.count(b'":') != keys or b"\t" in line or b"\r" in line:
        return None
    if b" :" in line and (b'" :' in line or b"  :" in line):
        return None
    return record


def _count_keys(value: Any) -> int:
    """Keys of all objects in a JSON value; below zero if it holds a whole number too long for orjson, which rounds it."""
    count = 0
    if type(value) is dict:
        count = len(value)
        value = value.values()
    for inner in value:
        kind = type(inner)
        if kind is str:  # nearly all are; this runs on every record of a corpus
            continue
        if kind is dict or kind is list:
            count += _count_keys(inner)
        elif kind is float and not -(2.0**63) < inner < 2.0**63:
            count -= 2**40
    return count


def parse_object(line: str) -> dict[str, Any]:
    """The JSON object on a line. Raises :class:`DataError` with the reason, without file and line."""
    try:
        value = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise DataError("nested too deeply") from None
    except ValueError as error:
        raise DataError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def read_records(path: Path, rejects: Rejects) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", record) of each line of a JSONL file; blank lines are no records."""
    for row in read_rows(path, rejects):
        yield row.place, row.record


def read_texts(
    files: Sequence[Path],
    rejects: Rejects,
    text_key: str = "text",
    text_unit: str = "line",
    without_key: Callable[[dict[str, Any]], str] | None = None,
) -> Iterator[tuple[str, str]]:
    """("file:line", document) of JSONL records' ``text_key``, and of .txt files by ``text_unit``, "line" or "file".

    A record that has no such key is bad, unless ``without_key`` finds a text in it; that too may raise :class:`DataError`.
    """
    for path in files:
        if kind_of(path) == ".jsonl":
            for place, record in read_records(path, rejects):
                text = record.get(text_key)
                if text is None and without_key is not None:
                    try:
                        text = without_key(record)
                    except DataError as error:
                        rejects.add(place, str(error))
                        continue
                if problem := text_problem(text, text_key, record):
                    rejects.add(place, problem)
                else:
                    yield place, text
            continue
        lines = read_lines(path)
        for number, text in [(1, "\n".join(line for _, line in lines))] if text_unit == "file" else lines:
            if "\0" in text:
                rejects.add(f"{path}:{number}", "holds a zero byte, as UTF-16 does; convert the file to UTF-8 first")
            elif text.strip():
                yield f"{path}:{number}", text
            elif text_unit == "file":
                rejects.add(f"{path}:{number}", "the file is empty")


def text_problem(text: Any, key: str, record: dict) -> str:
    """Why ``text``, the value of ``key``, is no text to learn from, or ""."""
    if text is None:
        return f"no key {key!r} (found: {', '.join(map(repr, record)) or 'none'}); name the right one with --text_key"
    if not isinstance(text, str):
        return f"{key!r} is {type(text).__name__}, not text"
    if not text.strip():
        return f"{key!r} is empty"
    return unencodable(text)


def unencodable(text: str) -> str:
    """The reason why ``text`` cannot be written as UTF-8 (half of a surrogate pair, from an escape), or ""."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half of a character (U+{ord(text[error.start]):04X}), which cannot be stored"
    return ""


_BETWEEN = re.compile(r"[ \t\r]*[:,]?[ \t\r]*")  # the values of an object


def as_line(record: dict[str, Any], like: Row | None = None) -> bytes:
    """A record as a line of JSON, characters as they are.

    Values that ``record`` has from the row ``like`` stay as they are spelt on its line: written anew, 1e5 would be 100000.0,
    and a number of 20 digits would lose some. Raises :class:`DataError` for what JSON or UTF-8 does not have: dates, bytes,
    NaN, half characters.
    """
    try:
        if like is None or not like.line:
            return _dump(record).encode("utf-8")
        spelt, old = _spelling(like.line.decode("utf-8")), like.record
        pairs = ((key, spelt[key] if key in spelt and old[key] is value else _dump(value)) for key, value in record.items())
        return f"{{{', '.join(f'{_dump(key)}: {text}' for key, text in pairs)}}}".encode()
    except RecursionError:
        raise DataError("cannot be written as JSON (nested too deeply)") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot be written as JSON ({error}); leave such keys out (convert --drop_keys)") from None


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _spelling(line: str) -> dict[str, str]:
    """How each value of the object on a line, which must be valid, is written there."""
    found: dict[str, str] = {}
    decode = json.JSONDecoder().raw_decode
    at = _BETWEEN.match(line, line.index("{") + 1).end()
    while line[at] != "}":
        key, end = decode(line, at)
        start = _BETWEEN.match(line, end).end()
        _, end = decode(line, start)
        found[key] = line[start:end]
        at = _BETWEEN.match(line, end).end()
    return found


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> int:
    """Write a JSONL file, whole or not at all; returns the number of records."""
    count = 0
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        for record in records:
            file.write(as_line(record) + b"\n")
            count += 1
    return count
