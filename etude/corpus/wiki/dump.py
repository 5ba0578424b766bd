"""The pages of a MediaWiki export (schema 0.10 and 0.11: Wikipedia's dumps, Special:Export), as a stream.

The reader unpacks, finds where pages end and passes on batches of raw XML; worker processes parse them. MediaWiki writes
``<`` within a page's text as ``&lt;`` and has neither comments nor CDATA sections, so ``</page>`` ends a page wherever it
stands. A file of other making that uses them around a ``</page>`` is refused, since its pieces are not well-formed.
Each page is parsed as a document of its own that begins with ``<page``: no DTD, hence no entity of the file's own making
and no reference to another file, ever reaches the parser.

Format: https://www.mediawiki.org/wiki/Help:Export
"""

import codecs
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from etude.corpus.streams import COMPRESSED_SUFFIXES, open_binary
from etude.corpus.wiki.bzip2 import unpack_bz2
from etude.corpus.workers import ahead
from etude.errors import DataError

BATCH_BYTES = 2**20  # of XML: worth the journey to a worker
CHUNK_BYTES = 2**18  # unpacked at once
AHEAD_CHUNKS = 8  # unpacked and not yet looked at; a .bz2 file's are of a MiB or more
HEAD_BYTES = 2**20  # the most that may stand before the first page; Wikipedia has 10 kB there
MAX_TAGS = 200_000  # in one page, and
MAX_TAG_BYTES = 2**16  # in one tag: a parsed tag or attribute takes 20 times the memory of the shortest one written
MAX_TITLE_CHARS = 1000  # MediaWiki allows 255 bytes

PAGE_END = b"</page>"
_ID, _NAMESPACE = re.compile(r"\s*\d{1,18}\s*"), re.compile(r"\s*-?\d{1,9}\s*")
_FIRST_PAGE = re.compile(rb"<page[\s>]")
# Possessive throughout: an expression that tried again from every space would take hours over a MiB of them.
_HEAD = re.compile(rb"\s*+(<\?xml\b[^>]*+>)?+\s*+(?:<!--(?>.*?-->)\s*+)*+(?=<mediawiki[\s/>])", re.DOTALL)
_END = re.compile(rb"\s*+</mediawiki\s*+>\s*+")
_ENCODING = re.compile(rb"""encoding\s*=\s*["']([^"']*)""")
_KNOWN_ENCODINGS = {b"utf-8", b"utf8", b"us-ascii", b"ascii", b"utf-16", b"utf-16le", b"utf-16be"}
_LONG_TAG = re.compile(rb"<[^<>]{%d}" % MAX_TAG_BYTES)

Namespaces = tuple[tuple[int, str], ...]  # (number, name) of all but 0, the articles', whose name is empty


class Batch(NamedTuple):
    """Whole pages as they stand in the file, or the ``fault`` that ends the reading, in its turn."""

    path: Path
    line: int  # the number of the line that ``xml`` begins on
    namespaces: Namespaces  # as the head of the export lists them
    xml: bytes
    fault: str = ""


class Page(NamedTuple):
    """A page, in its last revision."""

    id: int
    title: str
    namespace: int
    is_redirect: bool
    model: str  # "wikitext", unless it is a script, a style sheet, data, …
    text: str


class BadPage(NamedTuple):
    """What stands where a page should."""

    line: int
    reason: str
    xml: bytes


class _DamageError(Exception):
    """Why the reading cannot go on; where is added by :func:`read_batches`."""


# --- pages, in a worker ----------------------------------------------------------------------------------------------


def pages_of(batch: Batch) -> Iterator[Page | BadPage]:
    """Parse a batch's pages. Raises :class:`DataError` where the batch is a fault."""
    if batch.fault:
        raise DataError(batch.fault)
    line = batch.line
    for piece in batch.xml.split(PAGE_END)[:-1]:
        xml = piece.lstrip() + PAGE_END
        start = line + piece.count(b"\n", 0, len(piece) - len(piece.lstrip()))
        try:
            yield _parse(xml, batch.namespaces)
        except DataError as error:
            yield BadPage(start, str(error), xml)
        line += piece.count(b"\n")


def _parse(xml: bytes, namespaces: Namespaces) -> Page:
    """The page that ``xml`` is. Raises :class:`DataError` with the reason alone."""
    if not _FIRST_PAGE.match(xml):
        raise DataError(f"expected <page>, found {xml[:40].decode('utf-8', 'backslashreplace')!r}")
    if len(xml) > BATCH_BYTES and (xml.count(b"<") > MAX_TAGS or _LONG_TAG.search(xml)):
        raise DataError(f"the page has over {MAX_TAGS} tags, or one over {MAX_TAG_BYTES >> 10} KiB; no wiki writes such a page")
    root = _parse_xml(xml)
    title, number, namespace = root.findtext("title"), root.findtext("id"), root.findtext("ns")
    if not title or len(title) > MAX_TITLE_CHARS:
        raise DataError(f"the page has a title of {len(title)} characters" if title else "the page has no title")
    if not _ID.fullmatch(number or ""):
        raise DataError(f"the page {title!r} has {f'the id {number[:40]!r}' if number else 'no id'}; expected a number")
    if namespace and not _NAMESPACE.fullmatch(namespace):
        raise DataError(f"the page {title!r} (id {number}) has the namespace {namespace[:40]!r}; expected a number")
    revisions = root.findall("revision")
    text = revisions[-1].find("text") if revisions else None
    if text is None:
        raise DataError(f"the page {title!r} (id {number}) has no text element")
    if len(text):
        raise DataError(f"the page {title!r} (id {number}) has XML tags or comments within its text; expected &lt;")
    return Page(
        int(number),
        title,
        int(namespace) if namespace else _namespace_of(title, namespaces),
        root.find("redirect") is not None,
        revisions[-1].findtext("model") or "wikitext",
        text.text or "",
    )


def _namespace_of(title: str, namespaces: Namespaces) -> int:
    """By the title's prefix, as exports before schema 0.6 have no <ns>."""
    prefix = title.partition(":")[0]
    return next((number for number, name in namespaces if name == prefix), 0)


def _parse_xml(xml: bytes):
    """Raises :class:`DataError` where it is not well-formed, UTF-8 included."""
    from lxml import etree

    try:
        return etree.fromstring(xml, _parser())
    except etree.XMLSyntaxError as error:
        raise DataError(f"not well-formed XML ({' '.join(str(error.msg).split())})") from None


@lru_cache
def _parser():
    from lxml import etree

    # The text of a page may be longer than the 10 MB that libxml2 allows at first, hence huge_tree.
    return etree.XMLParser(resolve_entities=False, load_dtd=False, no_network=True, huge_tree=True)


# --- batches, in the reader ------------------------------------------------------------------------------------------


def read_batches(path: Path, max_page_bytes: int, threads: int, bar: Any = None) -> Iterator[Batch]:
    """The pages of a dump, in their order, about :data:`BATCH_BYTES` at a time. Memory: about twice ``max_page_bytes``.

    ``path`` may end in .bz2 (whose streams ``threads`` threads unpack), .gz, .xz, .zst, or be ``-``. Where the file is
    damaged, cut short or no export, the last batch's ``fault`` says so: in its turn, so that it is the first fault that is
    told. A page longer than about ``max_page_bytes`` is such a fault: an archive of a kilobyte can hold one of a gigabyte.
    """
    unpacked = _unpacked(path, threads, bar)
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        unpacked = ahead(unpacked, AHEAD_CHUNKS)
    chunks = _as_utf8(unpacked)
    pending, taken, line = bytearray(), 0, 1  # taken: bytes of XML that came before what is pending
    namespaces, last = (), b""
    try:
        head_bytes, namespaces = _read_head(chunks, pending)
        for end in chain([head_bytes], _page_ends(chunks, pending, max_page_bytes)):
            xml = bytes(pending[:end])
            del pending[:end]
            if taken:
                last = xml
                yield Batch(path, line, namespaces, xml)
            taken += end
            line += xml.count(b"\n")
    except _DamageError as error:
        place = f"at byte {taken + len(pending)} of the XML; {_describe_last(last, namespaces)}"
        yield Batch(path, line, namespaces, b"", f"{path}: {error} ({place})")


def _page_ends(chunks: Iterator[bytes], pending: bytearray, max_page_bytes: int) -> Iterator[int]:
    """Fill ``pending``; each time whole pages of about :data:`BATCH_BYTES` are at its front, yield where they end.

    They are to be taken off before the next. Raises :class:`_DamageError`, after the last whole page.
    """
    searched = BATCH_BYTES
    try:
        for chunk in chain([b""], chunks):
            pending += chunk
            while (start := pending.find(PAGE_END, searched)) >= 0:
                yield start + len(PAGE_END)
                searched = BATCH_BYTES
            searched = max(BATCH_BYTES, len(pending) - len(PAGE_END))
            if len(pending) > BATCH_BYTES + max_page_bytes:
                raise _DamageError(
                    f"a page is longer than --max_page_bytes ({max_page_bytes}); raise it if such a page is meant"
                )
    except _DamageError:
        if (start := pending.rfind(PAGE_END)) >= 0:
            yield start + len(PAGE_END)
        raise
    if (start := pending.rfind(PAGE_END)) >= 0:
        yield start + len(PAGE_END)
    if not _END.fullmatch(pending):
        raise _DamageError(_describe_end(bytes(pending)))


def _describe_end(tail: bytes) -> str:
    if end := _END.match(tail):
        return (
            f"something follows </mediawiki>: {tail[end.end() :][:40].decode('utf-8', 'backslashreplace')!r}; is it two dumps?"
        )
    return "the file is cut short, without </mediawiki> at its end; fetch it again"


def _describe_last(xml: bytes, namespaces: Namespaces) -> str:
    """Names the last page in ``xml``, for the person to see how far a damaged file goes."""
    if not xml:
        return "no whole page was read"
    start = max(xml.rfind(b"<page>"), 0)
    try:
        page = _parse(xml[start:], namespaces)
    except DataError:
        return "the last whole page is bad as well"
    return f"the last whole page is {page.title!r}, id {page.id}"


def _read_head(chunks: Iterator[bytes], pending: bytearray) -> tuple[int, Namespaces]:
    """Fill ``pending`` up to the first page; returns where that begins. Raises :class:`_DamageError` where this is no export."""
    first_page = None
    for chunk in chunks:
        pending += chunk
        first_page = _FIRST_PAGE.search(pending)
        if first_page or len(pending) > HEAD_BYTES:
            break
    head = bytes(pending[: first_page.start() if first_page else len(pending)])
    if b"<!DOCTYPE" in head or b"<!ENTITY" in head:
        raise _DamageError("it has a DOCTYPE, which no MediaWiki export has; its entities could be a trap, so it is not read")
    start = _HEAD.match(head)
    if start is None:
        beginning = head[:24].decode("utf-8", "backslashreplace")
        raise _DamageError(
            f"no MediaWiki export: it begins with {beginning!r}, not <mediawiki>" if head else "the file is empty"
        )
    if first_page is None and len(pending) > HEAD_BYTES:
        raise _DamageError(f"no MediaWiki export of pages: there is no <page> in its first {HEAD_BYTES >> 20} MiB")
    if (encoding := _ENCODING.search(start[1] or b"")) and encoding[1].lower() not in _KNOWN_ENCODINGS:
        raise _DamageError(f"its encoding is {encoding[1].decode('ascii', 'backslashreplace')}; convert it to UTF-8 first")
    if first_page is None:
        ended = re.search(rb"(</mediawiki\s*>|/>)\s*\Z", head)
        raise _DamageError("there is no <page> in it" if ended else _describe_end(head))
    try:
        root = _parse_xml(head[start.end() :] + b"</mediawiki>")
        listed = [(name.get("key"), name.text) for name in root.iterfind(".//{*}namespace") if name.text]
        return len(head), tuple((int(key), name) for key, name in listed)
    except (DataError, TypeError, ValueError) as error:
        raise _DamageError(f"what stands before the first page is broken: {error}") from None


def _as_utf8(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """UTF-16, known by its byte order mark or its first character, recoded; a mark at the start of UTF-8 taken off."""
    start = b""
    for chunk in chunks:
        start += chunk
        if len(start) >= 4:
            break
    chunks = chain([start], chunks)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif start[:2] in (b"<\0", b"\0<"):
        encoding = "utf-16-le" if start[:1] == b"<" else "utf-16-be"
    else:
        yield next(chunks).removeprefix(codecs.BOM_UTF8)
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode("utf-8")
        yield decoder.decode(b"", final=True).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _DamageError(f"not UTF-16, as its beginning is ({error.reason})") from None


# --- bytes -----------------------------------------------------------------------------------------------------------


def _unpacked(path: Path, threads: int, bar: Any) -> Iterator[bytes]:
    """The file's contents. Raises :class:`_DamageError` for a damaged archive."""
    try:
        if path.suffix.lower() == ".bz2":
            with open(path, "rb", buffering=0) as file:
                yield from unpack_bz2(file, threads, bar)
        else:
            with open_binary(path, bar) as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
    except (_DamageError, DataError, MemoryError):
        raise
    except Exception as error:  # lzma, zlib and zstd have error classes of their own
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the archive's
        raise _DamageError(f"the compressed file is damaged or cut short: {error}") from None
