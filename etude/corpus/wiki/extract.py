"""A Wikipedia dump → the plain text of its articles, as JSONL. Made for files of any size: nothing grows with the input."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

from etude.cli import option
from etude.corpus.inputs import distinct, input_path, kind_of, matching
from etude.corpus.jsonl import as_line
from etude.corpus.output import output_to, reading, require_kind, summary, tell
from etude.corpus.streams import PIPE
from etude.corpus.wiki.dump import BATCH_BYTES, BadPage, Batch, Namespaces, Page, pages_of, read_batches
from etude.corpus.wiki.wikitext import Wikitext, WikitextOptions
from etude.corpus.workers import cores, in_order
from etude.errors import DataError, UsageError
from etude.runlog import duration

# Wikipedia names the parts of a large dump …articles1.xml-p1p41242.bz2.
_DUMP_NAME = re.compile(r"\.xml(-p\d+p\d+)?(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)

# Why a page is left out, as the report says it.
OTHER_NAMESPACE = "in another namespace (--namespaces names those to keep)"
REDIRECT = "redirects to other pages"
OTHER_MODEL = "no wikitext, but a script, style sheet or data"
EMPTY = "empty"
DISAMBIGUATION = "disambiguation pages (--disambiguations keeps them)"
TOO_SHORT = "shorter than --min_chars"


@dataclass(frozen=True)
class ExtractConfig:
    input: tuple[str, ...] = option(
        (),
        "MediaWiki exports: .xml, also packed (.bz2 .gz .xz .zst; a multistream .bz2 unpacks on all cores), folders, globs, or - for XML from a pipe",
    )
    output: str = option(
        "",
        "file to write, or - for a pipe. .jsonl: a record {id, title, text} a page. .txt: the text of a page a line, its line "
        "breaks made spaces, as the training stages read it with --text_unit line. Then maybe .gz .bz2 .xz .zst",
    )
    shard_bytes: int = option(0, "make --output a folder of .jsonl files of about so many bytes each; 0: one file")
    force: bool = option(False, "overwrite the output")
    namespaces: tuple[int, ...] = option((0,), "numbers of the namespaces to keep; 0 is the articles, 14 the categories")
    disambiguations: bool = option(False, "keep disambiguation pages")
    min_chars: int = option(0, "leave out pages whose text has fewer characters; pages without any are left out always")
    tables: bool = option(False, "keep the text of tables and infoboxes")
    sections: bool = option(False, "keep the sections at the end of a page: references, see also, external links, …")
    variant: Literal["zh-hans", "zh-hant", "zh-cn", "zh-tw", "zh-hk", "zh-sg", "zh-mo", "zh-my"] = option(
        "zh-hans", "which wording to take where a Chinese page offers several (-{zh-hans:…;zh-hant:…}-)"
    )
    workers: int = option(0, "processes that clean pages; 0: one a core. The output is the same for any number")
    max_bad: int = option(0, "broken pages to let go, set aside in OUTPUT.rejected.jsonl; one more ends the job")
    max_page_bytes: int = option(2**26, "longest page to take, in bytes of XML: a guard against archives that never end")

    def __post_init__(self) -> None:
        for name, least in (
            ("shard_bytes", 0),
            ("min_chars", 0),
            ("workers", 0),
            ("max_bad", 0),
            ("max_page_bytes", BATCH_BYTES),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least {least}")


class Cleaned(NamedTuple):
    """What a worker makes of a :class:`Batch`."""

    lines: list[bytes]  # records to keep, ready to be written
    left_out: Counter[str]  # pages by reason
    bad: list[tuple[str, str, bytes]]  # (place, reason, XML)
    pages: int
    xml_bytes: int


def extract(config: ExtractConfig) -> None:
    """Write the text of a dump's articles; tell on standard error what was kept and what was not.

    Raises :class:`DataError` for a dump that is damaged or no export, and where no page is left to keep.
    """
    files = find_dumps(config.input)
    if config.output and not config.shard_bytes:
        require_kind(config.output, (".jsonl", ".txt"))
    workers = config.workers or cores()
    pages = xml_bytes = 0
    left_out: Counter[str] = Counter()
    started = time.monotonic()
    with (
        output_to(config.output, files, config.force, config.shard_bytes) as output,
        reading("extract", files) as bar,
    ):
        rejects = output.rejects(config.max_bad)
        batches = (batch for file in files for batch in read_batches(file, config.max_page_bytes, workers, bar))
        for cleaned in in_order(partial(clean, config), batches, workers):
            for line in cleaned.lines:
                output.write_line(line)
            for bad in cleaned.bad:
                rejects.add(*bad)
            left_out += cleaned.left_out
            pages += cleaned.pages
            xml_bytes += cleaned.xml_bytes
        if not output.kept:
            reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common())
            raise DataError(f"{', '.join(config.input)}: none of its {pages} pages is kept: {reasons or 'all are broken'}")
    seconds = time.monotonic() - started
    tell(f"read      {pages:,} pages, {xml_bytes:,} bytes of XML in {duration(seconds)}: "
         f"{pages / seconds:,.0f} pages/s, {xml_bytes / seconds / 1e6:,.1f} MB/s")  # fmt: skip
    summary(output, config.output)
    if left_out:
        tell(f"passed by {left_out.total():,} pages")
        for reason, count in left_out.most_common():
            tell(f"          {count:>12,}  {reason}")


def clean(config: ExtractConfig, batch: Batch) -> Cleaned:
    """The lines to write for a batch's pages. Raises :class:`DataError` where the batch is a fault of the dump."""
    done = Cleaned([], Counter(), [], batch.xml.count(b"</page>"), len(batch.xml))
    options = WikitextOptions(tables=config.tables, sections=config.sections, variant=config.variant)
    wikitext = _wikitext(options, batch.namespaces)
    line_of = _text_line if kind_of(Path(config.output)) == ".txt" and not config.shard_bytes else _json_line
    for page in pages_of(batch):
        if isinstance(page, BadPage):
            done.bad.append((f"{batch.path}:{page.line}", page.reason, page.xml))
            continue
        reason, text = _judge(page, config, wikitext)
        if reason:
            done.left_out[reason] += 1
        else:
            done.lines.append(line_of(page, text))
    return done


def _judge(page: Page, config: ExtractConfig, wikitext: Wikitext) -> tuple[str, str]:
    """(reason to leave the page out or "", its text), the cheapest questions first."""
    if page.namespace not in config.namespaces:
        return OTHER_NAMESPACE, ""
    if page.is_redirect:
        return REDIRECT, ""
    if page.model != "wikitext":
        return OTHER_MODEL, ""
    if not config.disambiguations and wikitext.is_disambiguation(page.text):
        return DISAMBIGUATION, ""
    text = wikitext.clean(page.text, page.title)
    if not text.strip():
        return EMPTY, ""
    return (TOO_SHORT if len(text) < config.min_chars else ""), text


@lru_cache(maxsize=4)
def _wikitext(options: WikitextOptions, namespaces: Namespaces) -> Wikitext:
    """Made once a worker and wiki: its patterns hold the names of the namespaces."""
    return Wikitext(options, namespaces={number: (name,) for number, name in namespaces})


def _json_line(page: Page, text: str) -> bytes:
    return as_line({"id": page.id, "title": page.title, "text": text})


def _text_line(page: Page, text: str) -> bytes:
    return " ".join(filter(None, map(str.strip, text.split("\n")))).encode("utf-8")


def find_dumps(names: Sequence[str]) -> list[Path]:
    """The files that ``names`` give: files whatever they are called, what looks like a dump in folders, globs, and ``-``."""
    if not names:
        raise UsageError("name an --input: MediaWiki exports, folders of them, globs, or - for standard input")
    return distinct(file for name in names for file in _find(input_path(name)))


def _find(path: Path) -> Iterator[Path]:
    if path == PIPE or path.is_file():
        yield path
        return
    below = path.rglob("*") if path.is_dir() else matching(path)
    dumps = sorted(file for file in below if file.is_file() and _DUMP_NAME.search(file.name))
    if not dumps:
        what = "no .xml file in this folder" if path.is_dir() else "no such file or folder"
        raise DataError(f"{path}: {what}; name MediaWiki exports (.xml, also .bz2 .gz .xz .zst)")
    yield from dumps
