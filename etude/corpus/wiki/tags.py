"""The HTML in wikitext: comments, tags, references and coded characters (``&eacute;``). The first step of cleaning a page.

What is shown as it is written (``<math>``, ``<pre>``, ``<nowiki>``, …) is taken out of the page, so that no later step reads it
as markup, and put back by the last one. HTML tables become wiki tables, to be treated as such.
"""

import re
from html.entities import html5

from etude.corpus.wiki.marks import BREAK, DROPPED, LITERAL, LITERAL_END

# Tags whose inside is not markup, or is not shown: {name: what becomes of it}.
KEPT = {"nowiki", "pre", "code", "syntaxhighlight", "source"}
FORMULAS = {"math", "chem", "ce"}
HIDDEN = {"gallery", "timeline", "imagemap", "score", "hiero", "graph", "templatedata", "mapframe", "maplink", "inputbox"}
HIDDEN |= {"includeonly", "categorytree", "indicator", "templatestyles", "dynamicpagelist", "rp", "style", "script"}
OPAQUE = KEPT | FORMULAS | HIDDEN | {"poem"}
OPAQUE_TAG = re.compile(rf"<(?:!--|((?i:{'|'.join(sorted(OPAQUE))}))(?=[\s/>])[^<>]*+>)")
CLOSING_TAG = {name: re.compile(rf"</{name}\s*+>", re.IGNORECASE) for name in OPAQUE}
# A reference ends at its first closing tag; one that holds another reference was never closed. (The group is not possessive, as it
# could be: Python 3.11.2 then finds nothing, https://github.com/python/cpython/issues/106052.)
REFERENCE = re.compile(
    r"<[rR][eE][fF](?=[\s/>])[^<>]*+>(?:(?<=/>)|[^<]*+(?:<(?!/?[rR][eE][fF][\s/>])[^<]*+)*</[rR][eE][fF]\s*+>)"
)
TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*+)[^<>]*+>")
HIDDEN_SPAN = re.compile(r"<span[^<>]*?display:\s?none[^<>]*+>[^<]*+</span>")
SUPERSCRIPT = re.compile(r"<sup>([+\-−–]?(?:\d{1,6}|&minus;\d{1,4}|[nkm]))</sup>")
POWER = re.compile(r"(?:[\d)\]]|(?<![^\W\d_])[^\W\d_])$")  # what a power is written behind: a number, a bracket, a lone letter
# What HTML tags leave. An HTML table becomes a wiki table, to be treated as one.
TAG_TEXT = {
    name: text
    for text, names in {
        "": """abbr b bdi bdo big cite data del dfn em font i ins kbd label mark noinclude onlyinclude q rb ref references rtc ruby s
            samp section small span strike strong sub sup time translate tt tvar tbody thead tfoot colgroup col u var wbr a phonos
            languages math chem ce /li /tr /td /th""",
        BREAK: "br p div center blockquote ul ol dl dd dt hr h1 h2 h3 h4 h5 h6 caption",
    }.items()
    for name in names.split()
}
TAG_TEXT |= dict.fromkeys(OPAQUE, "")
TAG_TEXT |= {f"/{name}": text for name, text in TAG_TEXT.items()}
TAG_TEXT |= {"li": f"{BREAK}- ", "rt": "(", "/rt": ")"}
TAG_TEXT |= {"table": "\n{|\n", "/table": "\n|}\n", "tr": "\n|-\n", "td": "\n| ", "th": "\n| "}

CODED_CHARACTER = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def without_tags(text: str, literals: list[str]) -> str:
    """``text`` without comments and tags. What is kept as it is written goes to ``literals``, its number to the text."""
    text = _without_opaque(text, literals)
    text = REFERENCE.sub(DROPPED, text)
    if "<" not in text:
        return text
    if "<sup" in text:
        text = SUPERSCRIPT.sub(_power, text)
    if "none" in text:
        text = HIDDEN_SPAN.sub("", text)
    # an unknown tag, as in "#include <stdio.h>", is text
    return TAG.sub(lambda tag: TAG_TEXT.get(tag[1] + tag[2].lower(), tag[0]), text)


def _without_opaque(text: str, literals: list[str]) -> str:
    """Take out comments and the tags whose inside is no markup. What is to be kept of them goes to ``literals``."""
    out: list[str] = []
    end = 0
    unclosed = set()  # each is looked for to the end of the page, but only once
    while found := OPAQUE_TAG.search(text, end):
        start, inside = found.span()
        name = found[1].lower() if found[1] else "!--"
        out.append(text[end:start])
        end = inside
        if name == "!--":
            close = -1 if name in unclosed else text.find("-->", inside)
            if close < 0:
                unclosed.add(name)
                continue
            end = close + 3
            if text[start - 1] == "\n" == text[end : end + 1]:
                end += 1  # a line that holds only a comment is no line
            continue
        if text[inside - 2] == "/":
            continue
        closing = None if name in unclosed else CLOSING_TAG[name].search(text, inside)
        if closing is None:
            unclosed.add(name)
            continue
        body, end = text[inside : closing.start()], closing.end()
        if name in HIDDEN:
            out.append(DROPPED)
        elif name == "poem":
            out.append(BREAK + body.strip("\n").replace("\n", BREAK) + BREAK)
        elif literal := _literal(name, body):
            literals.append(literal)
            out.append(f"{LITERAL}{len(literals) - 1}{LITERAL_END}")
    out.append(text[end:])
    return "".join(out)


def _literal(name: str, body: str) -> str:
    if name in FORMULAS:
        return " ".join(body.split())
    if name in ("syntaxhighlight", "source"):
        return body.strip("\n")
    if "<" in body:
        body = re.sub(r"</?nowiki\s*+/?>", "", body)
    return CODED_CHARACTER.sub(decoded, body).strip("\n")


def _power(found: re.Match) -> str:
    before = found.string[max(0, found.start() - 2) : found.start()]
    return f"^{found[1]}" if POWER.search(before) else found[1]


def decoded(found: re.Match) -> str:
    """The character of a :data:`CODED_CHARACTER`; what is none stays as it stands."""
    name = found[1]
    if name[0] == "#":
        code = int(name[2:], 16) if name[1] in "xX" else int(name[1:])
        if code < 32:
            return " "
        return "" if code > 0x10FFFF or 0xD800 <= code < 0xE000 else chr(code)
    return html5.get(name + ";", found[0])
