"""The layout of a page whose markup is resolved: quotes, gaps, headings, lists and blank lines become lines of plain text.

The last steps of :mod:`etude.corpus.wiki.wikitext`, each from text to text; every mark is gone afterwards.
"""

import re

from etude.corpus.wiki import names
from etude.corpus.wiki.marks import BREAK, EQUALS, LITERAL, LITERAL_END, PIPE
from etude.corpus.wiki.stack import ARGUMENT

QUOTES = re.compile(r"''++")
LITERAL_TEXT = re.compile(rf"{LITERAL}(\d++){LITERAL_END}")
SEPARATORS = " ,;:、，；："
BRACKETS = {"(": ")", "[": "]", "（": "）", "【": "】"}


def without_quotes(line: str) -> str:
    """A line without its bold and italic marks. An apostrophe beside them (l'''arbre'') stays, as MediaWiki has it."""
    runs = QUOTES.findall(line)
    lengths = [len(run) for run in runs]
    if max(lengths) in (2, 3, 5) and 4 not in lengths:
        bold = lengths.count(3) + lengths.count(5)
        italic = lengths.count(2) + lengths.count(5)
        if not (bold % 2 and italic % 2):
            return QUOTES.sub("", line)
        # An odd number of both: one ''' is ' and ''. The likeliest follows a word of one letter, then any word.
        starts = [run.start() for run in QUOTES.finditer(line) if len(run[0]) == 3]
        if not starts:
            return QUOTES.sub("", line)
        after_word = [start for start in starts if start and not line[start - 1].isspace()]
        after_letter = [start for start in after_word if start == 1 or line[start - 2].isspace()]
        start = (after_letter or after_word or starts)[0]
        return QUOTES.sub("", line[:start]) + "'" + QUOTES.sub("", line[start:])
    return QUOTES.sub(lambda run: "'" if len(run[0]) == 4 else "", line)


def magic_word(found: re.Match) -> str:
    """What ``__WORD__`` leaves: nothing if it is one of MediaWiki's, in any language; else itself."""
    word = found[1]
    if word.isascii():
        return "" if word in names.MAGIC_WORDS else found[0]
    return "" if word == word.upper() else found[0]


def mend(pieces: list[str]) -> str:
    """Join what stood between things taken out, without what they leave: "( ; )", " ,", blank lines."""
    out = [pieces[0]]
    for piece in pieces[1:]:
        left = out[-1]
        last = left[-1:]
        if last in BRACKETS and last:
            piece = piece.lstrip(SEPARATORS)
            if piece[:1] == BRACKETS[last]:
                out[-1] = left = left[:-1].rstrip(" ")
                piece = piece[1:]
                last = left[-1:]
        first = piece[:1]
        if not piece:
            continue
        if last == "\n":
            if first == "\n":
                piece = piece[1:]
            elif first in " ,;":
                piece = piece.lstrip(" ,;")
        elif last == " " and left[-2:-1] in ("*", "#"):
            piece = piece.lstrip(" ,;")
        elif first in ")]）】":
            out[-1] = left.rstrip(SEPARATORS)
        elif last == " " and first in " ,.;:!?\n。，、；：":
            out[-1] = left = left.rstrip(" ")
            last = left[-1:]
        if first in ",;、，；" and last == first:
            piece = piece[1:]
        if piece:
            out.append(piece)
    return "".join(out)


def laid_out(lines: list[str]) -> str:
    """Headings, lists and blank lines, as the text has them."""
    out: list[str] = []
    headings: list[tuple[int, str]] = []  # with nothing below them so far
    term = ""  # ";term", waiting for its definition

    def add(line: str) -> None:
        nonlocal term
        for _, heading in headings:
            if out and out[-1]:
                out.append("")
            out.append(heading)
        headings.clear()
        if term:
            out.append(term)
            term = ""
        out.append(line)

    for line in lines:
        line = line.strip()
        if not line:
            if out and out[-1] and not headings:
                out.append("")
            continue
        first = line[0]
        if first == "=" and line[-1] == "=" and len(line) > 2:
            if term:
                add("")
            level, title = read_heading(line)
            while headings and headings[-1][0] >= level:
                headings.pop()
            if title:
                headings.append((level, title.replace(BREAK, " ")))
        elif first in "*#:;":
            content = line.lstrip("*#:;").strip(f" {BREAK}")
            if not content:
                continue
            marks = line[: len(line) - len(line.lstrip("*#:;"))]
            if marks[-1] == ";":
                head, colon, definition = _split_definition(content)
                if colon:
                    add(f"{head}: {definition}")
                else:
                    if term:
                        add("")
                    term = content
            elif marks[-1] == ":":
                if term:
                    content, term = f"{term.rstrip(':：')}: {content}", ""
                add(content)
            else:
                add("- " + content)
        elif first == "|":
            # a row of a table or an argument of a template that was never closed
            if line[1:2] not in ("-", "+", "}") and not ARGUMENT.match(line)[0].endswith("="):
                add(line.lstrip("| "))
        elif line.startswith("----"):
            if rest := line.lstrip("-").strip():
                add(rest)
        else:
            add(line)
    if term:
        add("")
    return "\n".join(out)


def _split_definition(content: str) -> tuple[str, str, str]:
    """(term, colon, definition) of ";term: definition". The colon of an address is none."""
    found = re.search(r":(?!//)", content)
    if not found:
        return content, "", ""
    head, definition = content[: found.start()].strip(), content[found.end() :].strip()
    return (head, ":", definition) if head and definition else (content.strip(" :"), "", "")


def read_heading(line: str) -> tuple[int, str]:
    """(level, title) of ``== title ==``."""
    level = min(len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("=")), 6, (len(line) - 1) // 2)
    return level, line[level : len(line) - level].strip()


# Characters that show nothing, or only tell where a line may break.
INVISIBLE = {
    "\t": " ",
    "\xa0": " ",
    "\xad": "",
    "\u200b": "",
    "\u200e": "",
    "\u200f": "",
    "\u2060": "",
    "\ufeff": "",
    "\u2009": " ",
    "\u202f": " ",
}


def finish(text: str, literals: list[str]) -> str:
    """``text`` without marks, spaces and blank lines too many, and with the ``literals`` in their places."""
    for character, replacement in INVISIBLE.items():
        if character in text:
            text = text.replace(character, replacement)
    if BREAK in text:
        text = re.sub(rf" *+{BREAK}[ {BREAK}]*+", "\n", text)
    if PIPE in text or EQUALS in text:
        text = text.replace(PIPE, "|").replace(EQUALS, "=")
    if "  " in text:
        text = re.sub(r"  ++", " ", text)
    text = re.sub(r"\n{3,}+", "\n\n", text).strip()
    if literals:
        text = LITERAL_TEXT.sub(lambda number: literals[int(number[1])], text).strip("\n")
    return text
