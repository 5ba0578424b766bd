"""From bytes to text without a wrong character: which encoding a file has, and its strict decoding in flat memory.

A byte order mark, or validity as UTF-8, settles it. Otherwise the beginning is read in every candidate encoding, and each
reading is scored by how likely its characters are: real Chinese is made of a few hundred frequent characters, the same bytes
misread are rare ones. Only a clear winner is believed; a person can always name the encoding instead.
"""

import codecs
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from etude.corpus.streams import READ_BYTES, open_binary
from etude.errors import DataError, UsageError

# The characters that make up most of any Chinese text, modern or classical, in the simplified and the traditional script.
FREQUENT_HAN = (
    "的一是不了在有人我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法"
    "学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业"
    "外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西月话合回特代内信表化老给世位次度门任常先海通教儿原东声提"
    "立及比员解水名真论处走义各入几口认条平系气题活更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克"
    "许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王完设式色路记南品住告类求据程北边死张该交规万取望觉术领共"
    "确传师观清今切院让识候带导争运笑吃曰云矣乎哉春风花雪江夜秋酒君吾汝尔莫岂兮乃皆亦"
    "這個們來為國說時會對於著過發後裡裏種經麼學現當沒動還進樣開從實軍無與長機關點業將兩間問並應戰頭體產話給門東聲員論處義幾認條係氣題"
    "別變總電數報結務場計資許統區隊決馬書則聽達強難權萬設記類邊張該規覺術領確傳師觀讓識帶導爭運風雲爾豈"
)
FREQUENT_HANGUL = "이다는을의에가고를한하은로지기도사리자인아어나서대시그있수정들보일과부것제라었만여장주게구상"
CHINESE_PUNCTUATION = "，。、；：？！“”‘’（）《》「」『』…—·\u3000【】"

NO_CHARACTER = -25.0  # what bytes that are none in an encoding cost, in nats; control characters cost about the same
CLEAR_NATS, CLEAR_NATS_PER_BYTE = 12.0, 0.4  # a winner is this much likelier than the runner-up, in all and per non-ASCII byte
PLAUSIBLE_NATS = -11.0  # a character, on average: what is less likely than this is no text

# Read as encodings of one family: names for people, and the codecs that stand for them, the more usual one first.
FAMILIES = {
    "utf-8": ("utf-8",),
    "gb18030": ("gb18030",),
    "big5": ("cp950", "big5hkscs"),
    "utf-16-le": ("utf-16-le",),
    "utf-16-be": ("utf-16-be",),
    "utf-32-le": ("utf-32-le",),
    "utf-32-be": ("utf-32-be",),
    "shift_jis": ("cp932",),
    "euc_jp": ("euc_jp",),
    "euc_kr": ("cp949",),
    "cp1251": ("cp1251",),
    "koi8-r": ("koi8-r",),
    "latin-1": ("cp1252",),
}
WITH_ZERO_BYTES = {"utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"}
# What may be read without being named: the others are known well enough to be told apart from Chinese, and no better.
BELIEVED = {"utf-8", "gb18030", "big5"} | WITH_ZERO_BYTES
MARKS = {  # the longer ones first: UTF-32's little-endian mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    b"\x84\x31\x95\x33": "gb18030",
}
HIGH_BYTES = bytes(range(128, 256))
ENOUGH_BYTES = 8192  # non-ASCII bytes to look at before deciding
MAX_HEAD_BYTES = 4 * 2**20  # to look for them in
FOREIGN_CHARACTERS = 4  # of three bytes in UTF-8: a line with so many of them, and no other byte, is nothing else by chance


@dataclass(frozen=True)
class Encoding:
    """How a file is read."""

    codec: str  # Python's name of it
    name: str  # its name for people
    reason: str  # why it is believed to be that
    guessed: bool = False


def named(encoding: str) -> Encoding:
    """The encoding that a person names. Raises :class:`UsageError` if Python does not know it as one of text."""
    try:
        info = codecs.lookup(encoding)
    except (LookupError, ValueError):
        raise UsageError(
            f"encoding ({encoding}) is unknown; try utf-8, gb18030, big5, utf-16-le, shift_jis, euc_kr or latin-1"
        ) from None
    if not getattr(info, "_is_text_encoding", True) or info.incrementaldecoder is None:
        raise UsageError(f"encoding ({encoding}) is no encoding of text; try utf-8, gb18030 or big5")
    return Encoding(info.name, info.name, "named")


def detect(head: bytes, whole: bool = True) -> Encoding:
    """The encoding of a text that begins with ``head`` (and ends with it, if ``whole``).

    Raises :class:`DataError`, naming the candidates, where none is clearly the right one.
    """
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return Encoding(name, name, "byte order mark")
    if b"\x1b$" in head:
        raise DataError("holds escape sequences, as iso2022_jp does; name the encoding with --encoding")
    if b"\0" not in head:
        if head.isascii():
            return Encoding("utf-8", "utf-8", "ASCII")
        counts, bad = _bad_bytes(head, "utf-8", whole)
        # A few Chinese characters of two bytes each can be valid UTF-8 by chance, as letters that no language puts together.
        by_chance = max(counts, default="") < "\u0800" and len(head) - sum(counts.values()) < 8
        if not bad and not by_chance:
            return Encoding("utf-8", "utf-8", "valid")
    candidates = sorted(_read_as(name, head, whole) for name in FAMILIES if b"\0" in head or name not in WITH_ZERO_BYTES)
    (best, name, codec, mean), (second, runner_up, _, _) = candidates[-1], candidates[-2]
    high = len(head) - len(head.translate(None, HIGH_BYTES + b"\0"))
    if name == "utf-8" and b"\0" not in head and not bad:
        return Encoding("utf-8", "utf-8", "valid")
    if mean < PLAUSIBLE_NATS:
        raise DataError("is in no encoding known here, or no text at all; name the encoding with --encoding")
    if name not in BELIEVED:
        raise DataError(f"is not UTF-8, but {name} or {runner_up}, as it seems; name it with --encoding")
    if best - second < max(CLEAR_NATS, CLEAR_NATS_PER_BYTE * high):
        raise DataError(f"may be {name} or {runner_up}: there is too little to tell; name the right one with --encoding")
    return Encoding(codec, name, "by its characters", guessed=True)


def _read_as(name: str, head: bytes, whole: bool) -> tuple[float, str, str, float]:
    """(log-likelihood of ``head`` in nats, family's name, codec, nats per character that is not ASCII) of its best codec."""
    readings = []
    for codec in FAMILIES[name]:
        counts, bad = _bad_bytes(head, codec, whole)
        likelihood = {character: _nats(character) * count for character, count in counts.items()}
        foreign = [character for character in counts if not character.isascii() or character < " "]
        costs = sum(likelihood[character] for character in foreign if character not in "\n\r\t") + bad * NO_CHARACTER
        many = sum(counts[character] for character in foreign if character not in "\n\r\t") + bad
        # Of equal readings the first codec is taken: max takes the first of equals.
        readings.append((sum(likelihood.values()) + bad * NO_CHARACTER, codec, costs / max(1, many)))
    total, codec, mean = max(readings, key=lambda reading: reading[0])
    return total, name, codec, mean


def _bad_bytes(head: bytes, codec: str, whole: bool) -> tuple[Counter[str], int]:
    """(How often each character occurs, how many bytes are none) when ``head`` is read as ``codec``.

    A character that the end of ``head`` cuts is not counted as bad unless ``head`` is the ``whole`` text.
    """
    counts: Counter[str] = Counter()
    decoder = codecs.getincrementaldecoder(codec)()
    bad, at = 0, 0
    while bad < 200:  # by then it is no contest
        try:
            counts.update(decoder.decode(head[at:], final=whole))
            break
        except UnicodeDecodeError as error:
            counts.update(error.object[: error.start].decode(codec))
            bad += 1
            at += error.start + 1
            decoder.reset()
    return counts, bad + (len(head) - at if bad == 200 else 0)


@cache
def _nats(character: str) -> float:
    """The logarithm of how likely a character is in a text of the languages told apart here: shares by class, roughly."""
    return math.log(_share(ord(character), character))


def _share(code: int, character: str) -> float:
    if character in "\n\r\t" or 0x20 <= code < 0x7F:
        return 1e-2  # the same in every candidate: only that ASCII be not eaten by a misread neighbour matters
    if character in _frequent():
        return 1e-3
    if character in CHINESE_PUNCTUATION:
        return 5e-3
    if code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF):
        return 1e-11  # control characters
    if 0xE000 <= code < 0xF900 or code >= 0xE0000:
        return 1e-10  # private use
    if 0x3041 <= code <= 0x3096:
        return 6e-3  # hiragana
    if 0x30A1 <= code <= 0x30FC:
        return 2e-3  # katakana
    if 0xC0 <= code <= 0xFF and code not in (0xD7, 0xF7):
        return 2e-3  # Latin letters with accents
    if 0x430 <= code <= 0x44F or code == 0x451:
        return 2e-2  # Cyrillic, small
    if 0x410 <= code <= 0x42F or code == 0x401:
        return 1e-3  # Cyrillic, capital
    if character in FREQUENT_HANGUL:
        return 8e-3
    if character in _common():
        return 5e-5
    if code in (0xA0, 0xA9, 0xAB, 0xAE, 0xB0, 0xB7, 0xBB, 0x20AC) or 0x2010 <= code <= 0x2122 or 0xFF01 <= code <= 0xFF5E:
        return 5e-5  # signs of many languages
    return 1e-6


@cache
def _frequent() -> frozenset[str]:
    return frozenset(FREQUENT_HAN)


@cache
def _common() -> frozenset[str]:
    """What schools teach: GB 2312's and Big5's characters of the first level, and KS X 1001's syllables."""

    def rows(codec: str, first: int, last: int) -> str:
        pairs = (bytes([lead, trail]) for lead in range(first, last + 1) for trail in [*range(0x40, 0x7F), *range(0xA1, 0xFF)])
        decoded = (_decoded(pair, codec) for pair in pairs)
        return "".join(character for character in decoded if len(character) == 1)

    return frozenset(rows("gb2312", 0xB0, 0xD7) + rows("big5", 0xA4, 0xC6) + rows("euc_kr", 0xB0, 0xC8))


def _decoded(pair: bytes, codec: str) -> str:
    try:
        return pair.decode(codec)
    except UnicodeDecodeError:
        return ""


@contextmanager
def open_text(path: Path, encoding: str = "", bar: Any = None) -> Iterator[tuple[Encoding, Iterator[str]]]:
    """(how it is read, its text in pieces) of a file in the ``encoding`` named, or else detected; a BOM is no part of it.

    Memory does not grow with the file. Raises :class:`DataError` where no encoding is clearly the right one, and, while the
    pieces are drawn, for the first byte that is none in it, with its line and offset, or a line in another encoding than was
    detected.
    """
    with open_binary(path, bar) as file:
        blocks = _blocks(path, file)
        head = []
        found = named(encoding) if encoding else None
        if found is None:
            high = size = 0
            for block in blocks:
                head.append(block)
                high += len(block) - len(block.translate(None, HIGH_BYTES + b"\0"))
                size += len(block)
                if high >= ENOUGH_BYTES or size >= MAX_HEAD_BYTES:
                    break
            try:
                found = detect(b"".join(head), whole=high < ENOUGH_BYTES and size < MAX_HEAD_BYTES)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None
        blocks = chain(head, blocks)
        if found.guessed and found.name in ("gb18030", "big5"):
            blocks = _without_utf_8(path, found, blocks)
        yield found, _decode(path, found, blocks)


def _blocks(path: Path, file: Any) -> Iterator[bytes]:
    offset = 0
    while True:
        try:
            block = file.read(READ_BYTES)
        except Exception as error:  # each decompressor has error classes of its own
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{path}: the compressed file is damaged or cut short after {offset} bytes ({error})") from None
        if not block:
            return
        offset += len(block)
        yield block


def _without_utf_8(path: Path, found: Encoding, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same blocks. Raises :class:`DataError` for a line of UTF-8, as somebody adds to the end of an older file: many of
    them can be read as GB18030, too, as other characters.
    """
    number, held = 1, b""
    for block in blocks:
        *lines, held = (held + block).split(b"\n")
        for line in lines:
            _refuse_utf_8(path, found, number, line)
            number += 1
        if len(held) > READ_BYTES:
            held = b"\xff"  # so long a line is not judged
        yield block
    _refuse_utf_8(path, found, number, held)


def _refuse_utf_8(path: Path, found: Encoding, number: int, line: bytes) -> None:
    if line.isascii():
        return
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return
    if sum(character >= "\u0800" for character in text) >= FOREIGN_CHARACTERS:
        raise DataError(
            f"{path}:{number}: is UTF-8, where the file begins as {found.name}; convert this part of it, or name the --encoding"
        )


def _decode(path: Path, found: Encoding, blocks: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(found.codec)()
    fed, line, first = 0, 1, True
    while True:
        block = next(blocks, b"")
        fed += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # The error speaks of the block and what was left of the last one: both end at the same byte.
            offset = fed - len(error.object) + error.start
            line += _line_ends(error.object[: error.start], found.codec)
            raise DataError(
                f"{path}:{line}: not {found.name} (byte 0x{error.object[error.start]:02x} at offset {offset}); "
                "mend the file, or name another --encoding"
            ) from None
        line += text.count("\n")
        if text:
            yield text.removeprefix("\ufeff") if first else text
            first = False
        if not block:
            return


def _line_ends(data: bytes, codec: str) -> int:
    try:
        return data.decode(codec).count("\n")
    except UnicodeDecodeError:  # an encoding with shift states, whose state at the first byte is gone
        return data.count(b"\n")
