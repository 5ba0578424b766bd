"""Data sets: lines that training would refuse, rows that teach nothing, copies, and validation rows that training sees."""

import dataclasses
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from etude.chat import ChatFormat
from etude.corpus.conversations import Messages
from etude.corpus.inputs import find_files, kind_of
from etude.corpus.jsonl import Rejects, read_records, read_texts
from etude.corpus.rows.documents import is_conversation
from etude.corpus.rows.near import NearIndex, signatures
from etude.data.sft import cut, read_conversation
from etude.data.tokens import goes_to_validation
from etude.doctor.report import Report, some_of
from etude.errors import DataError, MismatchError, UsageError
from etude.tokenizer import TURN_END, TURN_START, Tokenizer

NEAR, NGRAM, NUM_PERM = 0.8, 5, 128  # what process_jsonl.py dedup takes for near-duplicates
TEACH_NOTHING = 0.01  # rows without a learnt token: above this share more than a few odd ones, so an alarm
READ_ALL = "--max_rows 0 reads all"
NO_END = 0.5  # rows cut inside their reply: above this share most replies never show their end
ROUND_TRIPS = 1_000  # rows whose text is encoded and read back
LENGTHS = 10_000  # conversations whose tokens are counted


class Row(NamedTuple):
    place: str  # "file:line"
    text: str  # all that it says
    messages: Messages | None  # of a conversation


@dataclass(frozen=True)
class DataSet:
    name: str  # "data" or "val_data"
    rows: list[Row]
    conversations: bool
    bad: list[str]  # "file:line: reason"
    whole: bool  # not only the first rows were read


@dataclass(frozen=True)
class Reading:
    """How data is to be read; a run's own settings, or what the person said."""

    text_key: str = "text"
    text_unit: str = "line"
    conversations: bool | None = None  # None: as the first record says
    max_rows: int = 0
    max_bad: int = 0


def read_data(name: str, sources: Sequence[str], how: Reading) -> DataSet:
    """The rows of a data set, read by what training reads them with.

    Raises :class:`DataError` where there is no file, :class:`MismatchError` for files of two kinds.
    """
    files = find_files(sources)
    kinds = {file: found for file in files if (found := _holds_conversations(file, how.text_key)) is not None}
    if len(set(kinds.values())) == 2:
        text, chat = (next(file for file, found in kinds.items() if found is kind) for kind in (False, True))
        raise MismatchError(f"text ({text}) and conversations ({chat}) together: no stage learns both; name them apart")
    conversations = any(kinds.values()) if how.conversations is None else how.conversations
    rejects, rows, whole = Rejects(max_bad=sys.maxsize), [], True
    for file in files:
        try:
            for row in _rows_of(file, rejects, conversations, how):
                if how.max_rows and len(rows) >= how.max_rows:
                    whole = False
                    break
                rows.append(row)
        except DataError as error:  # the file cannot be read beyond this line
            rejects.reasons.append(f"{error}; nothing after it was read")
    return DataSet(name, rows, conversations, rejects.reasons, whole)


def _rows_of(file: Path, rejects: Rejects, conversations: bool, how: Reading):
    if not conversations:
        for place, text in read_texts([file], rejects, how.text_key, how.text_unit):
            yield Row(place, text, None)
        return
    if kind_of(file) != ".jsonl":
        raise DataError(f"{file}:1: text, where conversations are expected")
    for place, record in read_records(file, rejects):
        try:
            messages = read_conversation(record)
        except DataError as error:
            rejects.add(place, str(error))
            continue
        yield Row(place, "\n".join(message["content"] for message in messages), messages)


def _holds_conversations(file: Path, text_key: str) -> bool | None:
    """What a file's first record is decides: a file that mixes both is wrong for either stage. None where the first hundred are
    neither.
    """
    if kind_of(file) != ".jsonl":
        return False
    try:
        for _, record in islice(read_records(file, Rejects(sys.maxsize)), 100):
            if record.get(text_key) is not None or is_conversation(record):
                return record.get(text_key) is None
    except DataError:
        pass  # told when the rows are read
    return None


def look_at_rows(data: DataSet, max_bad: int, report: Report) -> None:
    """Bad lines, and rows that occur more than once."""
    what = "conversations" if data.conversations else "texts"
    if data.bad:
        tell = report.warn if data.rows and len(data.bad) <= max_bad else report.bad
        skip = ", or let training skip so many with --max_bad" if data.rows else ""
        tell(
            f"{data.name}: lines",
            f"{len(data.bad):,} bad beside {len(data.rows):,} good: {some_of(data.bad)}; mend or remove them "
            f"(process_jsonl.py check lists all){skip}",
        )
    elif not data.rows:
        report.bad(f"{data.name}: lines", "there is no row, so nothing to learn; check the path")
    else:
        part = "" if data.whole else f" (the first ones; {READ_ALL})"
        report.ok(f"{data.name}: lines", f"{len(data.rows):,} {what}{part}, none bad")
    firsts: dict[bytes, str] = {}
    copies = []
    for row in data.rows:
        first = firsts.setdefault(_digest(row.text), row.place)
        if first != row.place:
            copies.append(f"{row.place} says what {first} says")
    if copies:
        report.warn(
            f"{data.name}: duplicates",
            f"{len(copies):,} of {_first(data)} rows are exact copies: {some_of(copies)}; "
            "they are learnt by heart more easily; process_jsonl.py dedup leaves them out",
        )
    elif not data.whole:
        report.not_looked(f"{data.name}: duplicates", f"none among {_first(data)} rows, and no more were read; {READ_ALL}")
    elif data.rows:
        report.ok(f"{data.name}: duplicates", "no row occurs twice")


def _first(data: DataSet) -> str:
    return f"{len(data.rows):,}" if data.whole else f"the first {len(data.rows):,}"


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8"), digest_size=16).digest()


def held_out(data: DataSet, fraction: float, seed: int) -> tuple[DataSet, DataSet]:
    """What training takes of a data set, and what it holds out for validation."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in data.rows:
        sides[goes_to_validation(row.text, fraction, seed)].append(row)
    return dataclasses.replace(data, rows=sides[0]), dataclasses.replace(data, rows=sides[1], name="the rows held out")


def look_for_leakage(train: DataSet, val: DataSet, report: Report) -> None:
    """Validation rows that training sees too, letter by letter or nearly: the validation loss then measures memory."""
    if not val.rows or not train.rows:
        report.not_looked("leakage", "there are no rows on one of the sides")
        return
    places = {_digest(row.text): row.place for row in train.rows}
    copies = [f"{row.place} is {places[_digest(row.text)]}" for row in val.rows if _digest(row.text) in places]
    part = (
        ""
        if train.whole and val.whole
        else f", but only the first rows were read ({len(train.rows):,} of training); {READ_ALL}"
    )
    tell = report.not_looked if part else report.ok  # what is held out of the first rows says nothing of the others
    if copies:
        report.bad(
            "leakage",
            f"{len(copies):,} of {_first(val)} validation rows are in the training data, too: {some_of(copies)}; the "
            "validation loss measures memory; take them out of one side (process_jsonl.py split never lets copies part)",
        )
    else:
        tell("leakage", f"none of {_first(val)} validation rows is an exact copy of a training row{part}")
    try:
        compared, near = _near_copies(train.rows, [row for row in val.rows if _digest(row.text) not in places])
    except UsageError as error:
        report.not_looked("near leakage", str(error))
        return
    if near:
        report.warn(
            "near leakage",
            f"{len(near):,} of {_first(val)} validation rows share {NEAR:.0%} of their {NGRAM}-word runs with training rows: "
            f"{some_of(near)}; fine where texts are made from patterns, else take them out (process_jsonl.py split --near)",
        )
    elif not compared:
        report.not_looked("near leakage", "no validation row is left to compare: they are exact copies, or have no words")
    else:
        tell("near leakage", f"no validation row is much like a training row{part}")


def _near_copies(train: list[Row], val: list[Row]) -> tuple[int, list[str]]:
    """How many validation rows could be compared, and which are like training rows."""
    rows, compared = [*train, *val], 0
    if not val:
        return 0, []
    with tempfile.TemporaryDirectory() as scratch:
        index = NearIndex(Path(scratch) / "near", NEAR, NUM_PERM)
        for start in range(0, len(rows), 10_000):
            numbers, signed = signatures([row.text for row in rows[start : start + 10_000]], NGRAM, NUM_PERM)
            index.add(numbers + start, signed)
            compared += int((numbers + start >= len(train)).sum())
        index.finish()
        # A group's first member is the smallest number, so it is a training row wherever the group has one.
        firsts, members = index.groups().members()
        lines = index.lines()
        pairs = [(int(lines[first]), int(lines[member])) for first, member in zip(firsts, members, strict=True)]
        del lines  # it maps a file of the folder that goes now
    return compared, [f"{rows[b].place} is like {rows[a].place}" for a, b in pairs if a < len(train) <= b]


def _spaced(rows: list[Row], count: int) -> list[Row]:
    """At most ``count`` of them, evenly spaced."""
    return rows if len(rows) <= count else [rows[number * len(rows) // count] for number in range(count)]


def look_at_encoding(data: DataSet, tokenizer: Tokenizer, block_size: int, report: Report) -> None:
    """What the tokenizer makes of the rows, and what is left of conversations once they are cut to ``block_size``."""
    rows = _spaced(data.rows, ROUND_TRIPS)
    lost = [row.place for row in rows if not comes_back(tokenizer, row.text)]
    control_ids = set(control_tokens(tokenizer).values())
    controls = [row.place for row in rows if control_ids.intersection(tokenizer.encode(row.text))]
    if lost:
        report.bad(
            f"{data.name}: tokens", f"the tokenizer does not give {len(lost):,} of {len(rows):,} rows back: {some_of(lost)}"
        )
    if controls:
        report.bad(f"{data.name}: tokens", f"words in {len(controls):,} rows become control tokens: {some_of(controls)}")
    if not lost and not controls:
        report.ok(f"{data.name}: tokens", f"{len(rows):,} rows come back from their tokens, and hold no control token")
    if data.conversations and tokenizer.settings.get("chat_template"):
        _look_at_lengths(data, ChatFormat(tokenizer), block_size, report)


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Name → id of the tokens that text must not become: those marked special, and those that ought to be."""
    ids = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.document_end_id, *tokenizer.special_ids}
    ids |= {found for name in (TURN_START, TURN_END) if (found := tokenizer.id_of(name)) is not None}
    return {tokenizer.decode([number]): number for number in sorted(ids)}


def comes_back(tokenizer: Tokenizer, text: str) -> bool:
    """Whether ``text`` survives its tokens. Compatible forms of a character count as the same, as do spaces at the ends: foreign
    tokenizers normalise those, and are used with it. Etude's own are held to every byte when they are looked at themselves.
    """

    def same_form(text: str) -> str:
        return unicodedata.normalize("NFKC", text).strip()

    decoded = tokenizer.decode(tokenizer.encode(text))
    return decoded == text or same_form(decoded) == same_form(text)


def _look_at_lengths(data: DataSet, format: ChatFormat, block_size: int, report: Report) -> None:
    teach_nothing, cut_after, cut_inside = [], [], []
    rows = _spaced(data.rows, LENGTHS)
    for start in range(0, len(rows), 1_000):
        part = rows[start : start + 1_000]
        for row, chat in zip(part, format.encode_batch([row.messages for row in part]), strict=True):
            chat, how = cut(chat, block_size + 1)  # n tokens fill n - 1 places
            if not any(chat.mask):
                teach_nothing.append(row.place)
            elif how:
                (cut_after if how == "after a reply" else cut_inside).append(row.place)
    check, count = f"{data.name}: replies", len(rows)
    if teach_nothing:
        tell = report.bad if len(teach_nothing) > TEACH_NOTHING * count else report.warn
        tell(
            check,
            f"{len(teach_nothing):,} of {count:,} conversations hold no learnt token: what comes before the first reply fills "
            f"block_size ({block_size}), so they are left out: {some_of(teach_nothing)}; raise --block_size or shorten them",
        )
    if cut_inside:
        tell = report.bad if len(cut_inside) > NO_END * count else report.warn
        tell(
            check,
            f"{len(cut_inside):,} of {count:,} conversations are cut inside their first reply at block_size ({block_size}), so they "
            f"teach no end token: {some_of(cut_inside)}; raise --block_size or shorten them",
        )
    if cut_after:
        report.warn(check, f"{len(cut_after):,} of {count:,} conversations lose later rounds at block_size ({block_size})")
    if rows and not (teach_nothing or cut_inside or cut_after):
        of_all = f" (evenly spaced, of {len(data.rows):,})" if len(rows) < len(data.rows) else ""
        report.ok(check, f"every reply of {count:,} conversations{of_all} fits block_size ({block_size}), end token included")
