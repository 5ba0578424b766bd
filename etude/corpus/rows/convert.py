"""Text files, JSON dialects, tables and Parquet → one kind of rows: {"text": …} or {"conversations": [{"role", "content"}]}."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from etude.cli import option
from etude.corpus import jsonl
from etude.corpus.conversations import check_order, to_messages
from etude.corpus.inputs import inputs_of, kind_of
from etude.corpus.jsonl import Rejects, Row, as_line, read_lines, read_rows, text_problem, unencodable
from etude.corpus.output import output_to, reading, require_kind, require_rows, summary
from etude.corpus.rows.documents import CONVERSATION_KEYS, is_conversation
from etude.corpus.rows.options import require_at_least
from etude.corpus.streams import create_binary
from etude.errors import DataError, UsageError

TEXT_KINDS, TABLE_KINDS = (".txt", ".md"), {".csv": ",", ".tsv": "\t"}
KINDS = (".jsonl", *TEXT_KINDS, *TABLE_KINDS, ".parquet")
PARQUET_ROWS = 1000  # read, and at least written, at once
DIALECT_KEYS = {*CONVERSATION_KEYS, "input", "output", "system"}  # what a converted conversation replaces


@dataclass(frozen=True)
class ConvertConfig:
    input: tuple[str, ...] = option((), f"files ({' '.join(KINDS)}), folders, globs, or - for JSONL on standard input")
    output: str = option("", "file to write: .jsonl, compressed by its ending, or .parquet; or - for standard output")
    force: bool = option(False, "overwrite the output if it exists")
    max_bad: int = option(0, "bad rows to set aside before giving up")
    text_key: str = option("text", "key or column of the text; it becomes 'text'")
    text_unit: Literal["line", "paragraph", "file"] = option("line", "what one row is of .txt (.md: a file unless paragraph)")
    drop_keys: bool = option(False, "write the text or conversation only, no other keys")

    def __post_init__(self) -> None:
        require_at_least(0, self, "max_bad")


def convert(config: ConvertConfig) -> int:
    """Write every input row in the one form, and return how many there were. Conversations are validated.

    A JSONL row that has the form already is copied byte for byte; of another, the keys that stay keep the spelling of their
    values. Raises :class:`DataError` for bad rows above ``max_bad``.
    """
    files = inputs_of(config.input, KINDS)
    require_kind(config.output or "-", [".jsonl", ".parquet"])
    if kind_of(Path(config.output)) == ".parquet" and not config.output.lower().endswith(".parquet"):
        raise UsageError(f"output ({config.output}): Parquet is compressed inside; let the name end in .parquet")
    create = ParquetLines if kind_of(Path(config.output)) == ".parquet" else create_binary
    with output_to(config.output, files, config.force, create=create) as output, reading("convert", files) as bar:
        rejects = output.rejects(config.max_bad)
        for path in files:
            for row in rows_of(path, rejects, config.text_unit, bar):
                try:
                    converted = in_one_form(row.record, config.text_key, config.drop_keys)
                    line = row.line if row.line and converted == row.record else as_line(converted, row)
                except DataError as error:
                    rejects.add(row.place, str(error), row.line or repr(row.record).encode("utf-8", "backslashreplace"))
                    continue
                output.write_line(line)
        require_rows(output.kept, files, rejects.reasons)
    summary(output, config.output)
    return output.kept


def in_one_form(record: dict[str, Any], text_key: str, drop_keys: bool) -> dict[str, Any]:
    """``record`` with its text under "text", or else its conversation under "conversations". Raises :class:`DataError`."""
    text = record.get(text_key)
    if text is None and is_conversation(record):
        messages = to_messages(record)
        check_order(messages)
        if not drop_keys and (lost := _lost_keys(record)):
            raise DataError(f"has keys that a conversation here does not keep ({', '.join(sorted(lost))}); use --drop_keys")
        for message in messages:
            if problem := unencodable(message["content"]):
                raise DataError(problem)
        others = {} if drop_keys else {key: value for key, value in record.items() if key not in DIALECT_KEYS}
        return {"conversations": messages, **others}
    if problem := text_problem(text, text_key, record):
        raise DataError(problem)
    if text_key != "text" and "text" in record and not drop_keys:
        raise DataError(f"has both {text_key!r} and 'text', which it would replace; use --drop_keys")
    others = {} if drop_keys else {key: value for key, value in record.items() if key not in (text_key, "text")}
    return {"text": text, **others}


def _lost_keys(record: dict[str, Any]) -> set[str]:
    """Keys of a conversation's record that its messages do not take up, though they belong to the dialect."""
    if "instruction" in record and "output" in record:
        used = {"instruction", "input", "output", "system"}
        return {key for key in DIALECT_KEYS if key in record} - used | (
            {"history"} & record.keys() if record.get("history") else set()
        )
    turns = record.get("conversations", record.get("messages"))
    in_turns = {key for turn in turns for key in turn} - {"role", "content", "from", "value"}
    one = "conversations" if "conversations" in record else "messages"
    return in_turns | {key for key in DIALECT_KEYS if record.get(key)} - {one, "system"}


def rows_of(path: Path, rejects: Rejects, text_unit: str, bar: Any) -> Iterator[Row]:
    """The rows of a file of any kind. Of what is no JSONL they have no line."""
    kind = kind_of(path)
    if kind == ".jsonl":
        return read_rows(path, rejects, bar)
    if kind in TABLE_KINDS:
        return table_records(path, TABLE_KINDS[kind], rejects, bar)
    if kind == ".parquet":
        return parquet_records(path, bar)
    return text_records(path, "file" if kind == ".md" and text_unit == "line" else text_unit, rejects, bar)


def text_records(path: Path, unit: str, rejects: Rejects, bar: Any) -> Iterator[Row]:
    """Lines, paragraphs (between blank lines) or the whole of a text file."""
    for number, text in joined(path, unit, bar):
        if "\0" in text:
            reason = "holds a zero byte, as UTF-16 does; convert the file to UTF-8 first (tool/split_text.py --encoding)"
            rejects.add(f"{path}:{number}", reason, text.encode())
        else:
            yield Row(f"{path}:{number}", b"", {"text": text})


def joined(path: Path, unit: str, bar: Any) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of each unit that is not blank."""
    begun, lines, size = 1, [], 0
    for number, line in read_lines(path, bar):
        blank = not line.strip()
        if unit == "line":
            if not blank:
                yield number, line
        elif unit == "paragraph" and blank:
            if lines:
                yield begun, "\n".join(lines)
            lines, size = [], 0
        else:
            begun = begun if lines else number
            lines.append(line)
            size += 4 * len(line)
            if size > 4 * jsonl.MAX_LINE_BYTES:
                limit = f"{jsonl.MAX_LINE_BYTES >> 20} Mi characters"
                raise DataError(f"{path}:{begun}: the {unit} is longer than {limit}; split it with tool/split_text.py")
    if text := "\n".join(lines).strip("\n"):
        yield begun, text


def table_records(path: Path, delimiter: str, rejects: Rejects, bar: Any) -> Iterator[Row]:
    """Rows of a CSV or TSV file by the names in its first line; fields may be quoted and go over lines."""
    csv.field_size_limit(jsonl.MAX_LINE_BYTES)
    reader = csv.reader((line + "\n" for _, line in read_lines(path, bar)), delimiter=delimiter, strict=True)
    names: list[str] = []
    number = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{number}: no {kind_of(path)[1:].upper()} ({error}); check its quotes") from None
        if fields is None:
            return
        place, number = f"{path}:{number}", reader.line_num + 1
        if not names:
            names = fields
            if len(set(names)) < len(names):
                raise DataError(f"{place}: a column's name occurs twice; the first line must name the columns")
        elif len(fields) == len(names):
            yield Row(place, b"", dict(zip(names, fields, strict=True)))
        elif fields:
            reason = f"{len(fields)} columns, where the first line names {len(names)}"
            rejects.add(place, reason, delimiter.join(fields).encode("utf-8"))


def parquet_records(path: Path, bar: Any) -> Iterator[Row]:
    """Rows of a Parquet file, some at a time; places count rows from 1."""
    parquet, pyarrow = _parquet()
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(PARQUET_ROWS):
            for record in batch.to_pylist():
                number += 1
                present = {key: value for key, value in record.items() if value is not None}
                yield Row(f"{path}:{number}", b"", present)
            bar.update(path.stat().st_size * batch.num_rows / max(file.metadata.num_rows, 1))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: no Parquet, or a damaged file ({reason[:200]})") from None


def _parquet():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("Parquet needs a package: pip install pyarrow") from None
    return pyarrow.parquet, pyarrow


class ParquetLines:
    """Lines of JSON written here become the rows of a Parquet file, with the columns that the first rows have."""

    def __init__(self, path: Path, like: Path):
        self._parquet, self._pyarrow = _parquet()
        self._file = open(path, "wb")
        self._records: list[dict[str, Any]] = []
        self._writer = None
        self._rows = 0

    def write(self, data: bytes) -> None:
        if data != b"\n":
            self._records.append(json.loads(data, parse_float=self._exact))
            if len(self._records) == PARQUET_ROWS:
                self._flush()

    def _exact(self, number: str) -> float:
        if Decimal(repr(value := float(number))) != Decimal(number):
            row = self._rows + len(self._records) + 1
            raise DataError(f"row {row:,} holds a number that Parquet's 64 bits would change ({number[:40]}); write .jsonl")
        return value

    def _flush(self) -> None:
        records, self._records = self._records, []
        schema = self._writer.schema if self._writer else None
        if schema is None:  # pyarrow would take the first row's keys for all
            keys = list(dict.fromkeys(key for record in records for key in record))
            records = [{key: record.get(key) for key in keys} for record in records]
        if schema is not None and (extra := unknown_keys(records, schema.names)):
            raise DataError(
                f"a row below row {self._rows:,} has the key {extra!r}, which those above have not; use --drop_keys"
            )
        try:
            table = self._pyarrow.Table.from_pylist(records, schema)
        except self._pyarrow.ArrowException as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"rows {self._rows + 1:,} to {self._rows + len(records):,} fit no columns ({reason})") from None
        for number, (kept, record) in enumerate(zip(table.to_pylist(), records, strict=True), self._rows + 1):
            if _without_nothing(kept) != _without_nothing(record):
                raise DataError(
                    f"row {number:,} does not fit the columns of those above (an inner key or a type); write .jsonl"
                )
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._file, table.schema, compression="zstd")
        self._writer.write_table(table)
        self._rows += len(records)

    def close(self) -> None:
        try:
            if self._records or self._writer is None:
                self._flush()
        finally:
            if self._writer is not None:
                self._writer.close()
            self._file.close()


def _without_nothing(value: Any) -> Any:
    """A JSON value without the keys whose value is null: Parquet makes no difference between null and nothing."""
    if isinstance(value, dict):
        return {key: _without_nothing(inner) for key, inner in value.items() if inner is not None}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value


def unknown_keys(records: Iterable[dict[str, Any]], names: Iterable[str]) -> str:
    """A key of the records that is no column, or ""."""
    known = set(names)
    return next((key for record in records for key in record if key not in known), "")
