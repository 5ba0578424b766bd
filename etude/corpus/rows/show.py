"""Look at rows: as they read, or as the tokens and loss mask that training sees."""

import itertools
import os
import random
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from etude.cli import option
from etude.corpus.conversations import Messages, to_messages
from etude.corpus.inputs import inputs_of
from etude.corpus.jsonl import Rejects, Row
from etude.corpus.rows.documents import is_conversation, rows_of, text_of
from etude.corpus.rows.options import INPUT, require_at_least
from etude.corpus.streams import standard_output
from etude.errors import DataError

COLOURS = {"system": "35", "user": "36", "assistant": "32", "learnt": "32", "context": "90", "place": "1"}  # ANSI
EncodeChat = Callable[[Messages], tuple[Sequence[int], Sequence[bool]]]  # ids, and which of them are learnt


@dataclass(frozen=True)
class ShowConfig:
    input: tuple[str, ...] = option((), INPUT)
    rows: int = option(3, "rows to show")
    start: int = option(1, "row to begin with, from 1")
    seed: int = option(-1, "show random rows of the whole input instead, drawn with this seed (-1: off)")
    tokenizer: str = option("", "show tokens and what of them is learnt, with the tokenizer in this folder")
    max_chars: int = option(2000, "characters of a text, or tokens of a table, to show (0: all)")
    text_key: str = option("text", "key of the text in rows that are no conversations")
    max_bad: int = option(0, "bad rows to pass over before giving up")

    def __post_init__(self) -> None:
        require_at_least(1, self, "rows", "start")
        require_at_least(0, self, "max_chars", "max_bad")


@standard_output()
def show(
    config: ShowConfig,
    encode_text: Callable[[str], Sequence[int]] | None = None,
    encode_chat: EncodeChat | None = None,
    decode: Callable[[int], str] = str,
) -> int:
    """Print some rows to standard output; returns how many. With the callables, rows appear as tables of tokens."""
    files = inputs_of(config.input)
    shown = 0
    for row in chosen(rows_of(files, Rejects(config.max_bad)), config.rows, config.start, config.seed):
        print(painted(f"── {row.place}", "place"))
        try:
            if encode_text is not None and encode_chat is not None:
                print(token_table(row, config, encode_text, encode_chat, decode))
            else:
                print(as_read(row, config))
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from None
        print()
        shown += 1
    if not shown:
        raise DataError(f"there is no row {config.start:,}; choose an earlier --start")
    return shown


def chosen(rows: Iterator[Row], count: int, start: int, seed: int) -> list[Row] | Iterator[Row]:
    """``count`` rows from ``start`` on; or, with a seed from 0 on, a uniform random choice among them, in their order."""
    rows = itertools.islice(rows, start - 1, None)
    if seed < 0:
        return itertools.islice(rows, count)
    source, kept = random.Random(seed), []
    for number, row in enumerate(rows):
        if len(kept) < count:
            kept.append((number, row))
        elif (place := source.randrange(number + 1)) < count:  # Vitter's algorithm R
            kept[place] = (number, row)
    return [row for _, row in sorted(kept)]


def as_read(row: Row, config: ShowConfig) -> str:
    """A text wrapped, a conversation turn by turn; other keys below."""
    record = row.record
    if record.get(config.text_key) is not None or not is_conversation(record):
        return wrapped(cut(text_of(record, config.text_key), config.max_chars)) + others(record, {config.text_key})
    turns = [
        painted(f"{message['role']}:", message["role"]) + "\n" + wrapped(cut(message["content"], config.max_chars), indent="  ")
        for message in to_messages(record)
    ]
    return "\n".join(turns) + others(record, {"conversations", "messages", "instruction", "input", "output", "system"})


def others(record: dict, known: set[str]) -> str:
    left = {key: value for key, value in record.items() if key not in known}
    return "\n" + painted(cut(printable(str(left)), 500), "context") if left else ""


def token_table(row: Row, config: ShowConfig, encode_text, encode_chat: EncodeChat, decode: Callable[[int], str]) -> str:
    """A line a token: place, id, whether its prediction is learnt, and its text."""
    if is_conversation(row.record) and row.record.get(config.text_key) is None:
        ids, mask = encode_chat(to_messages(row.record))
    else:
        ids = encode_text(text_of(row.record, config.text_key))
        mask = [True] * len(ids)
    lines = [f"{len(ids):,} tokens, {sum(mask):,} learnt", f"{'place':>7} {'id':>7}  learnt  token"]
    limit = config.max_chars or len(ids)
    for place, (token, learnt) in enumerate(zip(ids[:limit], mask[:limit], strict=True)):
        line = f"{place:>7} {token:>7}  {'yes' if learnt else '-':<6}  {decode(token)!r}"
        lines.append(painted(line, "learnt" if learnt else "context"))
    if len(ids) > limit:
        lines.append(f"… {len(ids) - limit:,} more (--max_chars)")
    return "\n".join(lines)


def cut(text: str, limit: int) -> str:
    """The beginning of a long text, and how much is missing."""
    return f"{text[:limit]}… ({len(text) - limit:,} more characters)" if limit and len(text) > limit else text


def wrapped(text: str, indent: str = "") -> str:
    """``text`` in lines that fit the terminal, where Chinese characters take two columns; broken after spaces, if there are."""
    width = max(20, shutil.get_terminal_size((100, 24)).columns - len(indent))
    lines = []
    for line in printable(text).split("\n"):
        begun = len(lines)
        while line or len(lines) == begun:
            end = fitting(line, width)
            space = line.rfind(" ", 0, end) + 1
            end = space if end < len(line) and space > end // 2 else end
            lines.append((indent + line[:end]).rstrip())
            line = line[end:]
    return "\n".join(lines)


def fitting(line: str, width: int) -> int:
    """How many characters of ``line`` fit into ``width`` columns, at least one."""
    taken = 0
    for number, character in enumerate(line):
        taken += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if taken > width:
            return max(number, 1)
    return len(line)


def printable(text: str) -> str:
    """``text`` with control characters shown rather than obeyed: a corpus must not command the terminal."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs") else f"\\x{ord(character):02x}"
        for character in text
    )


def painted(text: str, colour: str) -> str:
    """``text`` in a colour, if standard output is a terminal and NO_COLOR (no-color.org) does not forbid it."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"
