"""The job of tool/split_text.py: files of any encoding and size, normalised if asked for, cut into JSONL documents."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etude import paths
from etude.cli import option
from etude.corpus.inputs import distinct, input_path, kind_of, matching
from etude.corpus.jsonl import MAX_LINE_BYTES, Rejects, Row, as_line, parse_object, read_rows, unencodable
from etude.corpus.output import Output, output_to, reading, require_kind, require_rows, summary, tell
from etude.corpus.streams import PIPE
from etude.corpus.texts.cutting import Document, End, Measure, characters, documents
from etude.corpus.texts.encodings import Encoding, named, open_text
from etude.corpus.texts.normalise import NormaliseConfig, Step, normalise, normalised, steps
from etude.errors import DataError, UsageError

IN_FOLDERS = {".txt", ".text", ".md", ".markdown", ".rst", ".jsonl"}
MARKDOWN = {".md", ".markdown"}
SAMPLE_CHARACTERS = 32


@dataclass(frozen=True)
class CutConfig:
    """What is cut, where to, and how."""

    input: tuple[str, ...] = option(
        (), "text or .jsonl files, folders, globs, or - for text on standard input; also compressed"
    )
    output: str = option("", "JSONL file to write (.jsonl, then maybe .gz .bz2 .xz .zst), or -")
    input_format: Literal["auto", "text", "jsonl"] = option("auto", "auto: .jsonl files hold records, all others are text")
    encoding: str = option("", "encoding of the files (empty: found out, file by file, or refused; records are in UTF-8)")
    unit: Literal["chapter", "paragraph", "sentence"] = option(
        "paragraph", "what documents are made of; chapter: each begins a new one"
    )
    max_chars: int = option(4_000, "characters of a document, at most")
    max_tokens: int = option(0, "tokens of a document, at most (0: count characters instead)")
    tokenizer: str = option(lambda: paths.weight("tokenizer"), "folder of the tokenizer that counts them")
    overlap: int = option(0, "characters (or tokens) of whole sentences that a document repeats from the one before, at most")
    text_key: str = option("text", "key of the text, in .jsonl records read and in those written")
    source_key: str = option("", "also write under this key where a document is from: file, and number within it from 1")
    force: bool = option(False, "overwrite the output")
    max_bad: int = option(0, "bad files and records to set aside before giving up")

    def __post_init__(self) -> None:
        if self.max_chars < 1 or min(self.max_tokens, self.overlap, self.max_bad) < 0:
            raise UsageError("max_chars must be at least 1; max_tokens, overlap and max_bad at least 0")
        limit = self.max_tokens or self.max_chars
        if 2 * self.overlap > limit:
            raise UsageError(f"overlap ({self.overlap}) must be at most half of a document ({limit})")
        if not self.text_key or self.text_key == self.source_key:
            raise UsageError(f"text_key ({self.text_key!r}) must be given, and differ from source_key")
        if self.encoding:
            named(self.encoding)


@dataclass(frozen=True)
class SplitTextConfig(NormaliseConfig, CutConfig):
    """What split_text.py reads: the options of cutting, then those of normalising."""


@dataclass
class _Job:
    config: SplitTextConfig
    output: Output
    measure: Measure
    chosen: dict[str, Step]
    rejects: Rejects
    changed: Counter[str]  # characters by step
    ends: Counter[End]  # documents by what they end with
    encodings: Counter[str]  # files
    carriage_returns: int = 0


def split_text(config: SplitTextConfig, measure: Measure = characters) -> None:
    """Cut all files of ``config`` into documents. ``measure`` counts tokens, if ``max_tokens`` is to be kept.

    Raises :class:`DataError` for a file that is in no encoding for certain or has a byte that is none in it; within
    ``max_bad`` such a file is set aside whole.
    """
    require_kind(config.output, [".jsonl"])
    files, passed_over = _find(config.input)
    chosen = steps(config)
    with output_to(config.output, files, config.force) as output, reading("split", files) as bar:
        job = _Job(config, output, measure, chosen, output.rejects(config.max_bad), Counter(), Counter(), Counter())
        for path in files:
            if config.input_format == "jsonl" or (config.input_format == "auto" and path != PIPE and kind_of(path) == ".jsonl"):
                _split_records(job, path, bar)
            else:
                _split_file(job, path, bar)
        require_rows(output.kept, files, job.rejects.reasons, what="text")
    _report(job, passed_over)


def _find(names: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    """(The files that ``--input`` names, how many files of a folder were passed over by ending). A file that is named may end
    as it likes; of a folder's, only those that look like text are taken.
    """
    if not names:
        raise UsageError("name an --input: files, folders, globs, or - for standard input")
    found: list[Path] = []
    passed_over: Counter[str] = Counter()
    for name in names:
        path = input_path(name)
        if path == PIPE or path.is_file():
            found.append(path)
            continue
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
            matches = [file for file in below if kind_of(file) in IN_FOLDERS]
            passed_over.update(kind_of(file) or file.name for file in below if kind_of(file) not in IN_FOLDERS)
        else:
            matches = matching(path)
        if not matches:
            what = f"no {' '.join(sorted(IN_FOLDERS))} file in this folder" if path.is_dir() else "no such file or folder"
            raise DataError(f"{path}: {what}; check the path, or name the files")
        found += matches
    return distinct(found), passed_over


def _split_file(job: _Job, path: Path, bar: Any) -> None:
    config = job.config
    if config.max_bad and path != PIPE:  # a file that turns out to be bad leaves no document behind
        try:
            with open_text(path, config.encoding) as (_, chunks):
                for _ in chunks:
                    pass
        except DataError as error:
            reason = str(error).removeprefix(f"{path}:")
            line, _, rest = reason.partition(":")
            place, reason = (f"{path}:{line}", rest) if line.isdigit() else (str(path), reason)
            job.rejects.add(place, reason.strip())
            return
    with open_text(path, config.encoding, bar) as (found, chunks):
        _cut(job, path, _watched(job, path, found, chunks))


def _watched(job: _Job, path: Path, found: Encoding, chunks: Iterator[str]) -> Iterator[str]:
    """``chunks``; says how the file is read, with a taste of it, for a person to see whether that is right."""
    job.encodings[found.name] += 1
    sample = ""
    for number, chunk in enumerate(chunks):
        job.carriage_returns += chunk.count("\r")
        if number == 0:
            foreign = next((at for at, character in enumerate(chunk) if not character.isascii()), 0)
            sample = " ".join(chunk[max(0, foreign - 4) : foreign + 2 * SAMPLE_CHARACTERS].split())[:SAMPLE_CHARACTERS]
            if found.guessed or job.encodings[found.name] <= 5:
                tell(f"reading   {path} as {found.name} ({found.reason}): {sample}")
        yield chunk


def _cut(job: _Job, path: Path, chunks: Iterator[str]) -> None:
    number = 0
    for number, document in enumerate(_documents(job, normalised(chunks, job.chosen, job.changed), path), 1):
        record: dict[str, Any] = {job.config.text_key: document.text}
        if job.config.source_key:
            record[job.config.source_key] = {"file": path.as_posix(), "number": number}
        job.output.write(record)
        job.ends[document.end] += 1
    if number == 0:
        job.rejects.add(str(path), "the file is empty")


def _documents(job: _Job, chunks: Iterator[str], path: Path) -> Iterator[Document]:
    config = job.config
    limit = config.max_tokens or config.max_chars
    return documents(chunks, limit, config.unit, config.overlap, job.measure, kind_of(path) in MARKDOWN)


def _split_records(job: _Job, path: Path, bar: Any) -> None:
    """Records keep their other keys, in each of their parts; one that neither changes nor is cut keeps its very bytes."""
    config = job.config
    for row in _rows(job, path, bar):
        text = row.record.get(config.text_key)
        problem = "" if isinstance(text, str) and text.strip() else f"no text under the key {config.text_key!r}"
        if problem := problem or unencodable(text):
            job.rejects.add(row.place, problem, row.line)
            continue
        job.carriage_returns += text.count("\r")
        cleaned = normalise(text, job.chosen, job.changed)
        parts = list(_documents(job, iter([cleaned]), path))
        if not parts:
            job.rejects.add(row.place, f"{config.text_key!r} is empty once normalised", row.line)
        if len(parts) == 1 and cleaned == text and not config.source_key:
            lines = [row.line]
        else:
            try:
                lines = [_part_line(row, document, number, path, config) for number, document in enumerate(parts, 1)]
            except DataError as error:
                job.rejects.add(row.place, str(error), row.line)
                continue
        for document, line in zip(parts, lines, strict=True):
            job.ends[document.end] += 1
            job.output.write_line(line)


def _part_line(row: Row, document: Document, number: int, path: Path, config: CutConfig) -> bytes:
    record: dict[str, Any] = {**row.record, config.text_key: document.text}
    if config.source_key:
        line = int(row.place.rpartition(":")[2])
        record[config.source_key] = {"file": path.as_posix(), "line": line, "number": number}
    return as_line(record, row)


def _rows(job: _Job, path: Path, bar: Any) -> Iterator[Row]:
    """A JSONL file's rows; in UTF-8, as JSON is by its standard, unless another encoding is named."""
    if not job.config.encoding:
        yield from read_rows(path, job.rejects, bar)
        return
    with open_text(path, job.config.encoding, bar) as (_, chunks):
        for number, line in enumerate(_lines(path, chunks), 1):
            try:
                record = parse_object(line) if line.strip() else None
            except DataError as error:
                job.rejects.add(f"{path}:{number}", str(error), line.encode("utf-8"))
                continue
            if record is not None:
                yield Row(f"{path}:{number}", line.encode("utf-8"), record)


def _lines(path: Path, chunks: Iterator[str]) -> Iterator[str]:
    held = ""
    for chunk in chunks:
        *lines, held = (held + chunk).split("\n")
        yield from (line.rstrip("\r") for line in lines)
        if len(held) > MAX_LINE_BYTES:
            raise DataError(f"{path}: a line is longer than {MAX_LINE_BYTES >> 20} MiB; split it first")
    yield held


def _report(job: _Job, passed_over: Counter[str]) -> None:
    if job.encodings:
        tell("files     " + ", ".join(f"{count:,} {name}" for name, count in job.encodings.most_common()))
    if passed_over:
        listed = ", ".join(f"{count:,} {kind}" for kind, count in passed_over.most_common(8))
        tell(f"passed by {listed} in folders; name such files to have them read as text")
    for name, count in job.changed.items():
        tell(f"changed   {count:,} characters by --{name}")
    if job.carriage_returns and "line_ends" not in job.chosen:
        tell(f"note      {job.carriage_returns:,} carriage returns (Windows line ends) are kept; --line_ends makes them \\n")
    summary(job.output, job.config.output)
    names = {
        End.TEXT: "ends of texts",
        End.CHAPTER: "chapter headings",
        End.BLANK: "empty lines",
        End.PARAGRAPH: "ends of paragraphs",
        End.SENTENCE: "ends of sentences",
        End.LINE: "ends of lines within a sentence",
        End.LIMIT: "the limit, within a sentence",
    }
    tell("cut at    " + ", ".join(f"{job.ends[end]:,} {name}" for end, name in names.items() if job.ends[end]))
