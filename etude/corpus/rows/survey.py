"""Look a corpus over: every problem with its file and line, or what it consists of. Neither changes anything."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from etude import paths
from etude.cli import option
from etude.corpus.conversations import check_order, to_messages
from etude.corpus.inputs import inputs_of
from etude.corpus.jsonl import as_line, text_problem, unencodable
from etude.corpus.output import check_output, reading, require_rows
from etude.corpus.rows.documents import Batch, batches, is_conversation, parsed, text_of
from etude.corpus.rows.languages import count_scripts, language_guesser, main_scripts
from etude.corpus.rows.options import INPUT, require_at_least
from etude.corpus.streams import create_binary, standard_output
from etude.corpus.workers import in_order
from etude.errors import DataError
from etude.files import whole_file


@dataclass(frozen=True)
class SurveyConfig:
    """A job that reads all rows and reports on them."""

    input: tuple[str, ...] = option((), INPUT)
    output: str = option("", "also write the report to this file")
    force: bool = option(False, "overwrite the output if it exists")
    text_key: str = option("text", "key of the text in rows that are no conversations")
    workers: int = option(0, "processes (0: one a core)")

    def __post_init__(self) -> None:
        require_at_least(0, self, "workers")


@dataclass(frozen=True)
class CheckConfig(SurveyConfig):
    output: str = option("", "also list every problem in this .jsonl file: place, reason, kind")
    show: int = option(10, "problems to print; all are counted by kind")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(0, self, "show")


@standard_output()
def check(config: CheckConfig) -> None:
    """Name every row that the training stages would refuse: rows are texts, or conversations with their turns in order.

    Raises :class:`DataError` if there is any, after listing them.
    """
    files = inputs_of(config.input)
    if config.output:
        check_output(config.output, files, config.force)
    kinds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        report = None
        if config.output:
            temporary = stack.enter_context(whole_file(config.output))
            report = stack.enter_context(create_binary(temporary, Path(config.output)))
        bar = stack.enter_context(reading("check", files))
        for found, part in in_order(partial(check_batch, text_key=config.text_key), batches(files, bar), config.workers):
            counts.update(part)
            for place, reason in found:
                kinds[kind := kind_of_problem(reason)] += 1
                if kinds.total() <= config.show:
                    print(f"{place}: {reason}")
                if report is not None:
                    report.write(as_line({"place": place, "reason": reason, "kind": kind}) + b"\n")
    for name, count in counts.items():
        print(f"{name:<14}{count:>15,}")
    for kind, count in kinds.most_common():
        print(f"{'problem':<14}{count:>15,}  {kind}")
    if kinds:
        where = paths.typed(config.output) if config.output else "see all with --output problems.jsonl"
        raise DataError(f"{kinds.total():,} problems in {counts['rows']:,} rows ({where}); mend these rows or leave them out")
    require_rows(counts["rows"], files)


def kind_of_problem(reason: str) -> str:
    """A reason without its particulars, to count by."""
    return re.sub(r"(?<![\w-])\d+\b", "N", re.split(r" \(|; |: ", reason, maxsplit=1)[0])  # but UTF-8 keeps its name


def check_batch(batch: Batch, text_key: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(place, reason) of each problem in a batch, and counts of what was looked at."""
    found, rows, conversations, size = [], 0, 0, 0
    for place, line, record, problem in parsed(batch):
        rows += 1
        size += len(line) + 1
        conversations += is_conversation(record)
        if problem := problem or problem_of(record, text_key):
            found.append((place, problem))
    if batch.broken:
        place, _, reason = batch.broken.partition(": ")
        found.append((place, f"{reason} (the rest of the file was not looked at)"))
    return found, {"rows": rows, "conversations": conversations, "bytes": size}


def problem_of(record: dict[str, Any], text_key: str) -> str:
    """What keeps a record from being learnt from, or ""."""
    text = record.get(text_key)
    if text is not None and (problem := text_problem(text, text_key, record)):
        return problem
    if not is_conversation(record):
        found = ", ".join(map(repr, record)) or "none"
        return "" if text is not None else f"neither text nor conversation (keys: {found}); name one with --text_key"
    try:
        messages = to_messages(record)
        check_order(messages)
    except DataError as error:
        return str(error)
    return next(filter(None, (unencodable(message["content"]) for message in messages)), "")


@dataclass(frozen=True)
class StatsConfig(SurveyConfig):
    output: str = option("", "also write the figures to this .json file")
    languages: bool = option(False, "also tell each row's language (needs py3langid; about 0.1 ms a row)")
    tokenizer: str = option("", "also count tokens with the tokenizer in this folder (in this process alone)")
    max_bad: int = option(0, "bad rows to leave out of the figures before giving up")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(0, self, "max_bad")


@dataclass
class Figures:
    """What a corpus, or a batch of it, consists of. ``digests`` holds 8 bytes a row: the memory that finding repeats takes."""

    totals: Counter[str] = field(default_factory=Counter)  # rows, bytes, characters, …
    lengths: Counter[int] = field(default_factory=Counter)  # rows by bits of their number of characters
    scripts: Counter[str] = field(default_factory=Counter)  # rows by main script
    languages: Counter[str] = field(default_factory=Counter)  # rows
    dialects: Counter[str] = field(default_factory=Counter)  # rows: text, or a conversation's keys
    turns: Counter[int] = field(default_factory=Counter)  # conversations by messages
    digests: bytearray = field(default_factory=bytearray)
    bad: list[tuple[str, str]] = field(default_factory=list)  # (place, reason)

    def add(self, other: "Figures") -> None:
        for name in ("totals", "lengths", "scripts", "languages", "dialects", "turns"):
            getattr(self, name).update(getattr(other, name))
        self.digests += other.digests

    def repeats(self) -> int:
        """Rows whose text an earlier row has as well, by 64-bit digests: among 10⁹ rows 0.03 are expected to be no repeats."""
        import numpy as np

        digests = np.frombuffer(self.digests, np.uint64).copy()
        digests.sort()
        return int((digests[1:] == digests[:-1]).sum())


@standard_output()
def stats(config: StatsConfig, count_tokens: Callable[[Sequence[str]], list[int]] | None = None) -> Figures:
    """Print what a corpus consists of. ``count_tokens`` gives the tokens of each of some texts."""
    files = inputs_of(config.input)
    if config.output:
        check_output(config.output, files, config.force)
    if config.languages:
        language_guesser()  # a missing package is told before the work
    job = partial(measure, text_key=config.text_key, languages=config.languages, count_tokens=count_tokens)
    whole, bad = Figures(), []
    with reading("stats", files) as bar:
        for part in in_order(job, batches(files, bar), 1 if count_tokens else config.workers):
            for place, reason in part.bad:
                bad.append(f"{place}: {reason}")
                if len(bad) > config.max_bad:
                    raise DataError(f"{bad[-1]}; see all problems with check, or leave some out with --max_bad N")
            whole.add(part)
    require_rows(whole.totals["rows"], files, bad)
    whole.totals["left out, bad"] = len(bad)
    whole.totals["exact repeats"] = whole.repeats()
    print(described(whole))
    if config.output:
        with whole_file(config.output) as path:
            path.write_text(json.dumps(as_json(whole), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return whole


def measure(
    batch: Batch, text_key: str, languages: bool, count_tokens: Callable[[Sequence[str]], list[int]] | None = None
) -> Figures:
    """The figures of a batch. Raises :class:`DataError` for a file that breaks off."""
    if batch.broken:
        raise DataError(batch.broken)
    figures, texts = Figures(), []
    for place, line, record, problem in parsed(batch):
        try:
            if problem:
                raise DataError(problem)
            text = text_of(record, text_key)
            if record.get(text_key) is None:
                figures.turns[len(to_messages(record))] += 1
        except DataError as error:
            figures.bad.append((place, str(error)))
            continue
        texts.append(text)
        figures.dialects[dialect_of(record, text_key)] += 1
        figures.lengths[len(text).bit_length()] += 1
        data = text.encode("utf-8")
        figures.digests += blake2b(data, digest_size=8).digest()
        figures.totals.update({"rows": 1, "bytes of rows": len(line) + 1, "bytes of text": len(data), "characters": len(text)})
    if texts:
        figures.scripts.update(main_scripts(count_scripts(texts)))
        if languages:
            figures.languages.update(map(language_guesser(), texts))
        if count_tokens:
            figures.totals["tokens"] = sum(count_tokens(texts))
    return figures


def dialect_of(record: dict[str, Any], text_key: str) -> str:
    """How a row holds its text: ``text_key``, or the keys of a conversation and its turns."""
    if record.get(text_key) is not None:
        return text_key
    if "instruction" in record and "output" in record:
        return "instruction, output"
    key = "conversations" if "conversations" in record else "messages"
    return f"{key}: " + ("role, content" if "role" in record[key][0] else "from, value")


def as_json(figures: Figures) -> dict[str, Any]:
    lengths = {f"below {2**bits}": rows for bits, rows in sorted(figures.lengths.items())}
    tables = {name: dict(getattr(figures, name).most_common()) for name in ("scripts", "languages", "dialects")}
    return {**figures.totals, "characters of a row": lengths, **tables, "turns": dict(sorted(figures.turns.items()))}


def described(figures: Figures) -> str:
    """The figures as text, lengths as bars."""
    totals = figures.totals
    lines = [f"{name:<22}{count:>18,}" for name, count in totals.items()]
    if tokens := totals["tokens"]:
        lines.append(f"{'bytes a token':<22}{totals['bytes of text'] / tokens:>18.2f}")
    lines += ["", "characters of a row"]
    most = max(figures.lengths.values())
    for bits in range(min(figures.lengths), max(figures.lengths) + 1):
        rows = figures.lengths[bits]
        lines.append(f"  {2 ** (bits - 1):>12,} – {2**bits - 1:<12,}{rows:>14,}  {'█' * round(40 * rows / most)}".rstrip())
    for name in ("scripts", "languages", "dialects", "turns"):
        table = getattr(figures, name)
        if table:
            lines += ["", f"rows by {name.removesuffix('s') if name != 'turns' else 'messages'}"]
            shown = sorted(table.items()) if name == "turns" else table.most_common(20)
            lines += [f"  {key!s:<28}{rows:>14,}  {rows / table.total():6.1%}" for key, rows in shown]
    return "\n".join(lines)
