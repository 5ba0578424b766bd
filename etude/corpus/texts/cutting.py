"""Cut endless text into documents at the ends of chapters, paragraphs and sentences, Chinese and English, in flat memory.

Two steps, both streams: :func:`sentences` cuts text where it may be cut, each piece with the rank of its end; and
:func:`documents` puts pieces together up to a length, choosing the best of the ends there are. Nothing is lost: the pieces,
joined, are the text, and so are the documents but for white space where they were cut.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import islice
from typing import Literal, NamedTuple

Measure = Callable[[Sequence[str]], list[int]]  # the length of each text, in characters or in tokens


class End(IntEnum):
    """Where a piece of text ends: the higher, the better to cut there."""

    LIMIT = 0  # within a sentence that has no end in sight
    LINE = 1  # at the end of a line, within a sentence as far as one can tell: verse, lists, wrapped lines
    SENTENCE = 2
    PARAGRAPH = 3
    BLANK = 4  # before an empty line
    CHAPTER = 5  # before the heading of a chapter
    TEXT = 6  # the text itself ends


class Piece(NamedTuple):
    text: str
    end: End


Unit = Literal["chapter", "paragraph", "sentence"]

CLOSING = "”’」』）】〉》〕\"')\\]"
# Bounded repetition everywhere: what a match needs to see fits into LOOKAHEAD, however the text arrives.
_ENDS = re.compile(
    rf"[。！？…｡︒]{{1,32}}[{CLOSING}]{{0,8}}\s{{0,64}}"  # a sentence that ends in Chinese
    rf"|[.!?؟۔।॥]{{1,32}}[{CLOSING}]{{0,8}}\s{{0,64}}"  # perhaps one in English
    r"|[\r\n]\s{0,63}"
)
_MARK = re.compile(rf"[。！？…｡︒.!?؟۔।॥]*[{CLOSING}]*")
_GAP = re.compile(rf"[\s，、；：,;](?![\s{CLOSING}])")
LOOKAHEAD = 256  # characters after an end, and before it, that may decide what kind it is
_WORD = re.compile(r"[^\W\d_]+(?:\.[^\W\d_]+)*$")
_ITEM_NUMBER = re.compile(r"(?:^|[\r\n])\s*\(?\w{1,3}$")
_NEAR_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff，。、；：？！“”‘’「」『』《》（）\u3000]")
# After these a full stop ends no sentence, though a capital letter follows; after the second kind none before a number.
_TITLES = "mr mrs ms dr prof st jr sr messrs mme mlle gen col maj capt lt sgt cpl adm rev hon sen rep gov vs viz cf i.e e.g"
_BEFORE_NUMBERS = "no nos fig figs vol vols ch chap sec eq art app p pp jan feb mar apr jun jul aug sep sept oct nov dec ca"
ABBREVIATIONS, BEFORE_NUMBERS = frozenset(_TITLES.split(" ")), frozenset(_BEFORE_NUMBERS.split(" "))

_NUMBER = "[零〇○一二三四五六七八九十百千两兩廿卅0-9０-９]"
_ENGLISH_NUMBER = (
    r"(?i:[ivxlc]{1,8}|\d{1,4}|(?:the )?(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    r"[a-z]{3,5}teen|[a-z]{3,5}ty(?:-[a-z]{3,5})?|first|second|third|[a-z]{3,7}th|last))"
)
_HEADING = re.compile(
    rf"(?:正文\s{{0,4}})?第{_NUMBER}{{1,9}}(?:[回章][^，。！？；,;!?…]{{0,30}}|[回章节節卷部篇集幕折](?:[\s:：、.·—-].{{0,40}})?)"
    rf"|卷之?(?:{_NUMBER}{{1,5}}|[上中下])(?:[\s:：、.·—-].{{0,40}})?"
    r"|(?:楔子|序章|序幕|序言|引子|引言|前言|尾声|尾聲|终章|終章|后记|後記|附录|附錄|番外)(?:[\s:：·—-].{0,40})?"
    rf"|(?i:chapter|book|part|volume|act|scene|canto|letter|stave)\s{{1,3}}{_ENGLISH_NUMBER}[.:—–-]?(?:\s{{1,3}}[^a-z].{{0,60}})?"
    r"|(?i:prologue|epilogue|preface|foreword|introduction|afterword|appendix(?: \w{1,3})?)[.:]?"
)
_MARKDOWN_HEADING = re.compile(r"#{1,3} .{1,80}")


def is_heading(line: str, markdown: bool = False) -> bool:
    """Whether a line is the heading of a chapter: 第十二回 …, 卷三, 楔子, Chapter IV, PART ONE, Prologue; in Markdown # to ###."""
    line = line.strip()
    if not line or len(line) > 90 or line[0].islower():
        return False
    return bool(_HEADING.fullmatch(line)) or (markdown and bool(_MARKDOWN_HEADING.fullmatch(line)))


def sentences(chunks: Iterable[str], limit: int, markdown: bool = False) -> Iterator[Piece]:
    """The pieces of a text that comes in ``chunks``, cut however they may be; none is longer than ``limit`` characters.

    Joined, they are the text. Memory: ``limit`` and a chunk.
    """
    text, start, at = "", 0, 0  # what is held of the text; where the next piece begins, and the search for its end
    for chunk, last in _with_last(chunks):
        keep = max(0, start - LOOKAHEAD)  # to look back
        text, start, at = text[keep:] + chunk, start - keep, at - keep
        for match in _ENDS.finditer(text, at):
            if not last and match.end() + LOOKAHEAD > len(text):
                at = match.start()
                break
            at, end = _judge(text, match, markdown)
            if end is None:
                at = match.end()
                continue
            while at - start > limit:
                cut = _cut_within(text, start, start + limit)
                yield Piece(text[start:cut], End.LIMIT)
                start = cut
            if at > start:
                yield Piece(text[start:at], End.TEXT if last and at == len(text) else end)
            start = at
        else:
            at = len(text)
        while (len(text) - start > limit) if last else (at - start > limit + LOOKAHEAD):
            cut = _cut_within(text, start, start + limit)
            yield Piece(text[start:cut], End.LIMIT)
            start = cut
    if start < len(text):
        yield Piece(text[start:], End.TEXT)


def _with_last(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each chunk, and whether it is the last, which is empty."""
    yield from ((chunk, False) for chunk in chunks)
    yield "", True


def _judge(text: str, match: re.Match[str], markdown: bool) -> tuple[int, End | None]:
    """(Where the piece ends, what kind of end it is; None if it is none) for a match of ``_ENDS``."""
    start, end = match.span()
    mark_end = _MARK.match(text, start, end).end()
    gap = text[mark_end:end]
    sentence = mark_end > start
    if sentence and text[start] in "。！？…｡︒":
        if not gap and (quote := text.find('"', start, mark_end)) >= 0 and _opens(text, quote):
            return quote, End.SENTENCE  # 他走了。"你好" : the straight quote belongs to what follows
    elif sentence:
        sentence = _ends_english(text, start, mark_end, end)
    lines = gap.count("\n") or gap.count("\r")
    if not lines:
        return end, End.SENTENCE if sentence else None
    if is_heading(_line_before(text, mark_end), markdown):
        return end, None  # a heading stays with what it heads
    if is_heading(_line_after(text, end), markdown):
        return end, End.CHAPTER
    if lines > 1:
        return end, End.BLANK
    indented = gap[-1] in "\u3000\t" or gap.endswith("  ")
    return end, End.PARAGRAPH if sentence or indented else End.LINE


def _opens(text: str, quote: int) -> bool:
    """Whether the straight quote at ``quote`` is an opening one: an even number of them stand before it on its line."""
    line = text[max(0, quote - LOOKAHEAD) : quote].rpartition("\n")[2]
    return line.count('"') % 2 == 0 and text[quote + 1 : quote + 2].strip() != ""


def _ends_english(text: str, start: int, mark_end: int, end: int) -> bool:
    """Whether the ``.``, ``!`` or ``?`` at ``start`` ends a sentence: not in 3.14, nor after Mr., nor before a small letter."""
    before, after = text[max(0, start - 32) : start], text[end : end + 1]
    if mark_end == end:  # no space follows
        chinese = _NEAR_CHINESE.match(before[-1:]) or (_NEAR_CHINESE.match(after) and not before[-1:].isdigit())
        return not after or (bool(chinese) and not after.isdigit())
    if after.islower() or text[start] != "." or text.startswith("..", start):
        return not after.islower()
    word = _WORD.search(before)
    if word is None:
        return not _ITEM_NUMBER.search(before)  # "1. An item"
    name = word[0].lower()
    initial = word[0].rpartition(".")[2]
    if name in ABBREVIATIONS or (name in BEFORE_NUMBERS and after.isdigit()):
        return False
    return not (len(initial) == 1 and initial.isupper() and initial.isascii() and initial != "I")  # J. R. R. Tolkien


def _line_before(text: str, end: int) -> str:
    window = text[max(0, end - LOOKAHEAD + 100) : end]
    return re.split(r"[\r\n]", window)[-1] if window else ""


def _line_after(text: str, start: int) -> str:
    return re.split(r"[\r\n]", text[start : start + 128], maxsplit=1)[0]


def _cut_within(text: str, start: int, limit: int) -> int:
    """Where to cut a sentence that runs past ``limit``: after a space or comma in the last tenth, else between two characters.

    A character as people see it, accents and joined emoji included (a grapheme cluster, UAX #29), is not cut unless it is
    longer than 64 code points.
    """
    near = max(start + 1, limit - (limit - start) // 10)
    for gap in reversed(list(_GAP.finditer(text, near - 1, limit))):
        if _character_start(text, start, gap.end()) == gap.end():
            return gap.end()
    return _character_start(text, start, limit)


def _character_start(text: str, start: int, cut: int) -> int:
    """The last position up to ``cut`` where a grapheme cluster begins."""
    import regex  # comes with transformers

    window = max(start, cut - 64)
    starts = [match.start() for match in regex.finditer(r"\X", text, pos=window, endpos=min(len(text), cut + 64))]
    return max((at for at in starts if window < at <= cut), default=cut)


class Document(NamedTuple):
    text: str
    end: End


class _Held(NamedTuple):
    piece: Piece
    size: int


def characters(texts: Sequence[str]) -> list[int]:
    """Each text's length in characters: a :data:`Measure`."""
    return [len(text) for text in texts]


def documents(
    chunks: Iterable[str],
    limit: int,
    unit: Unit = "paragraph",
    overlap: int = 0,
    measure: Measure = characters,
    markdown: bool = False,
) -> Iterator[Document]:
    """Documents of at most ``limit`` characters, or whatever else ``measure`` counts, of a text that comes in ``chunks``.

    ``unit`` "chapter" begins one at every heading and cuts longer chapters at paragraphs; "paragraph" fills documents with
    paragraphs, and cuts at sentences where one has no end in a document's second half; "sentence" fills them with sentences.
    Each begins with the last whole sentences of the one before, up to ``overlap`` (0: none), within a chapter if that is
    the unit. White space around them is dropped, and so are documents of nothing else. Memory: ``limit``, not the text.
    """
    held: list[_Held] = []
    size = repeated = 0  # of all that is held; how many of its pieces the last document has as well
    for item in _measured(chunks, limit, measure, markdown):
        held.append(item)
        size += item.size
        while size > limit and len(held) > 1:
            count = _choose(held, limit, unit, repeated)
            if count == 0:  # what is repeated leaves no room for anything new
                size -= held.pop(0).size
                repeated -= 1
                continue
            found, count = _document(held, count, limit, unit, repeated, measure)
            yield from found
            repeat = _repeat(held[repeated:count], overlap)
            held, repeated = held[count - repeat :], repeat
            size = sum(item.size for item in held)
        if unit == "chapter" and item.piece.end == End.CHAPTER:
            yield from _rest(held, limit, unit, repeated, measure)
            held, size, repeated = [], 0, 0
    yield from _rest(held, limit, unit, repeated, measure)


def _rest(held: list[_Held], limit: int, unit: Unit, repeated: int, measure: Measure) -> Iterator[Document]:
    while len(held) > repeated:
        found, count = _document(held, len(held), limit, unit, repeated, measure)
        yield from found
        held, repeated = held[count:], 0


def _document(
    held: list[_Held], count: int, limit: int, unit: Unit, repeated: int, measure: Measure
) -> tuple[list[Document], int]:
    """([the document of the first ``count`` pieces], how many it has after all). Tokens of a whole may be more than those of
    its pieces: then it takes fewer, and a single piece makes two. The list is empty if they are white space.
    """
    room = limit
    while True:
        text, end = "".join(item.piece.text for item in held[:count]).strip(), held[count - 1].piece.end
        excess = measure([text])[0] - limit if text else 0
        if excess <= 0:
            return [Document(text, end)] if text else [], count
        if count == repeated + 1:
            break
        room -= excess
        count = max(repeated + 1, min(count - 1, _choose(held[:count], room, unit, repeated)))
    text, found = held[count - 1].piece.text.strip(), []
    while measure([text])[0] > limit and len(text) > 1:
        cut = _fitting(text, limit, measure)
        found.append(Document(text[:cut].strip(), End.LIMIT))
        text = text[cut:].strip()
    return [*found, Document(text, end)], count


def _choose(held: list[_Held], room: int, unit: Unit, repeated: int) -> int:
    """How many pieces make the next document: the best end within ``room``, at least one piece more than is ``repeated``;
    0 if not even that fits and leaving out what is repeated would help.
    """
    size, ends = 0, []
    for number, item in enumerate(held[:-1], 1):
        size += item.size
        if size > room:
            break
        if number > repeated:
            ends.append((number, item.piece.end, size))
    proper = [end for end in ends if end[1] >= End.SENTENCE]
    later = [end for end in proper if 2 * end[2] >= room]
    if later and unit != "sentence":
        return max(later, key=lambda end: (end[1], end[0]))[0]
    for candidates in (proper, [end for end in ends if end[1] == End.LINE], ends):
        if candidates:
            return candidates[-1][0]
    return 0 if repeated else 1


def _repeat(new: list[_Held], overlap: int) -> int:
    """How many pieces at the end of ``new``, not all of them, fit into ``overlap``."""
    count = size = 0
    while count < len(new) - 1 and (size := size + new[-1 - count].size) <= overlap:
        count += 1
    return count


def _measured(chunks: Iterable[str], limit: int, measure: Measure, markdown: bool) -> Iterator[_Held]:
    """The pieces with their sizes, none above ``limit``; measured many at a time, as a tokenizer likes it."""
    if measure is characters:
        for piece in sentences(chunks, limit, markdown):
            yield _Held(piece, len(piece.text))
        return
    # Sixteen characters a token is more than any vocabulary has on average: a longer piece would not fit anyway.
    pieces = sentences(chunks, 16 * limit, markdown)
    while batch := list(islice(pieces, 256)):
        for piece, size in zip(batch, measure([piece.text for piece in batch]), strict=True):
            while size > limit:
                cut = _fitting(piece.text, limit, measure)
                head, tail = piece.text[:cut], piece.text[cut:]
                yield _Held(Piece(head, End.LIMIT), measure([head])[0])
                piece, size = Piece(tail, piece.end), measure([tail])[0]
            yield _Held(piece, size)


def _fitting(text: str, limit: int, measure: Measure) -> int:
    """The longest beginning of ``text``, up to a place fit for a cut, that measures at most ``limit``; at least a character."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure([text[:middle].strip()])[0] <= limit else (low, middle - 1)
    return _cut_within(text, 0, low)
