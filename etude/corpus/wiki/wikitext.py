"""MediaWiki markup to prose, as a reader of the page would see it, for training a language model.

    Wikitext().clean("'''Bread''' is a [[staple food|staple]].<ref>…</ref>")   # "Bread is a staple."

What comes out: paragraphs set apart by at most one blank line; a heading as a line of its own, unless nothing stands below
it; list items as "- item" at every depth; "term: definition". TeX inside ``<math>``, and what stands in ``<pre>``, ``<code>``,
``<nowiki>`` and ``<syntaxhighlight>``, is kept as it is written. Links and bold leave their words; templates, what
:mod:`etude.corpus.wiki.templates` knows of them; references, files, categories and tables go. A power is
written 10^6, since "10<sup>6</sup>" would else read 106. Of ``-{…}-`` the chosen Chinese variant stays; the characters
outside it are not converted, nor are the page's own conversion rules (``-{H|…}-``, {{noteTA}}) applied to the rest.

How: the page is cut once at every token (``{{ }} [[ ]] {| |} -{ }-``, heading), and a stack pairs them. All of it takes
time linear in the page, whatever is nested or left open: patterns are possessive or stop at the next opener, and the stack
has a bottom that gives way. What is never closed counts as text, without its markup characters, so the page goes on.
mwparserfromhell, measured on 35 English articles, reads 1.8 MB/s on a core where this reads 25, and leaves the options of
images, the attributes of tables and gaps where a template held words; so it is not used.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.entities import html5

from etude.corpus.wiki import names
from etude.corpus.wiki.templates import infobox, is_infobox, parse_call, renderer, template_name


@dataclass(frozen=True)
class WikitextOptions:
    """What to keep of a page."""

    tables: bool = False  # the text of table cells and infoboxes: "cell | cell" a row, "name: value" a line
    sections: bool = False  # "References", "External links", "See also", … and their equivalents in other languages
    variant: str = "zh-hans"  # of Chinese, for -{…}-: zh-hans, zh-hant, zh-cn, zh-tw, zh-hk, zh-mo, zh-sg, zh-my


# Control characters, which XML cannot hold, stand for what a later step must see.
DROPPED = "\x01"  # something was taken out here; the punctuation around it may need mending
LITERAL, LITERAL_END = "\x02", "\x03"  # around the number of a text that is kept as it is
BREAK = "\x04"  # a line end that starts no list item and no table row
PIPE, EQUALS = "\x05", "\x06"  # characters of a rendered argument, not of the call around it
OPEN_TEMPLATE, OPEN_LINK, OPEN_TABLE = "\x0e", "\x0f", "\x10"  # where something began that never ended
PLACEHOLDERS = (DROPPED, LITERAL, LITERAL_END, BREAK, PIPE, EQUALS, OPEN_TEMPLATE, OPEN_LINK, OPEN_TABLE)

MAX_DEPTH = 64  # of open constructs; below, the oldest is given up. MediaWiki itself stops at 40

# Tags whose inside is not markup, or is not shown: {name: what becomes of it}.
KEPT = {"nowiki", "pre", "code", "syntaxhighlight", "source"}
FORMULAS = {"math", "chem", "ce"}
HIDDEN = {"gallery", "timeline", "imagemap", "score", "hiero", "graph", "templatedata", "mapframe", "maplink", "inputbox"}
HIDDEN |= {"includeonly", "categorytree", "indicator", "templatestyles", "dynamicpagelist", "rp", "style", "script"}
OPAQUE = KEPT | FORMULAS | HIDDEN | {"poem"}
OPAQUE_TAG = re.compile(rf"<(?:!--|((?i:{'|'.join(sorted(OPAQUE))}))(?=[\s/>])[^<>]*+>)")
CLOSING_TAG = {name: re.compile(rf"</{name}\s*+>", re.IGNORECASE) for name in OPAQUE}
# A reference ends at its first closing tag; one that holds another reference was never closed.
REFERENCE = re.compile(
    r"<[rR][eE][fF](?=[\s/>])[^<>]*+>(?:(?<=/>)|[^<]*+(?:<(?!/?[rR][eE][fF][\s/>])[^<]*+)*+</[rR][eE][fF]\s*+>)"
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

# Four links of five: no namespace, nothing nested.
SIMPLE_LINK = re.compile(r"\[\[(?:[^\[\]{}|:\n]*+\|)?(?!#)([^\[\]{}|:\n]++)\]\]")
HEADING = re.compile(rf"\n(=[^\n]*=)[ \t{DROPPED}]*+(?=\n)")
# Each begins with a plain character, so that the search skips what is none of them at the speed of a scan.
_TOKENS = rf"\[\[|\]\]++|\n[ \t:]*+\{{\||\{{\|(?<=\}}\}}\{{\|)|\n[ \t]*+\|\}}(?!\}})|\n(?==[^\n]*=[ \t{DROPPED}]*+\n)"
TOKEN = re.compile(r"(\{\{++|\}\}++|" + _TOKENS + ")")
TOKEN_WITH_VARIANTS = re.compile(r"(-\{(?!\{)|\}-|\{\{++|\}\}(?=\}-)|\}\}++|" + _TOKENS + ")")
HAS_TOKENS = ("{{", "[[", "{|", "}}", "]]", "-{", "}-")

EXTERNAL_LINK = re.compile(
    r"\[(?i:(?:https?:|ftps?:|ircs?:|gopher:|svn:|git:|news:|sftp:)?//|mailto:|news:|urn:|magnet:|tel:)[^\s\[\]]*+"
    r"(?:[^\S\n]++([^\[\]\n]*+(?:\[[^\[\]\n]*+\][^\[\]\n]*+)*+))?\]"
)
OPEN_EXTERNAL_LINK = re.compile(r"\[(?=(?:https?|ftp):?//)")
QUOTES = re.compile(r"''++")
MAGIC_WORD = re.compile(r"__([^\W\d_]{2,40})__")
CODED_CHARACTER = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
LITERAL_TEXT = re.compile(rf"{LITERAL}(\d++){LITERAL_END}")
ATTRIBUTES = re.compile(rf"(?:\s*+\w++\s?=\s?(?:\"[^\"]*+\"|[^\s\"]++))++[\s{DROPPED}]*+")  # of a cell without text
ARGUMENT = re.compile(r"\|(?:[\w \t.\-]*+=)?")
OPEN_LINE = re.compile(rf"[{OPEN_TEMPLATE}{OPEN_LINK}]([^\n{OPEN_TEMPLATE}{OPEN_LINK}]*+)")
TEMPLATE_NAME = re.compile(r"\{\{[^\S\n]*+([^|{}\n<]{1,80})[^\S\n]*+(?:\||\}\}|\n)")
REDIRECT = re.compile(rf"\s*+#(?:{names.REDIRECTS})\s?:?\s*+\[\[", re.IGNORECASE)
SEPARATORS = " ,;:、，；："
BRACKETS = {"(": ")", "[": "]", "（": "）", "【": "】"}


class Wikitext:
    """Cleans pages of one wiki. Holds only plain data, so it can be sent to a worker process.

    ``namespaces`` are those of the dump's siteinfo, number -> names; names known in many languages are added to them.
    """

    def __init__(self, options: WikitextOptions = WikitextOptions(), namespaces: Mapping[int, Sequence[str]] = {}):
        if options.variant not in names.VARIANT_FALLBACKS:
            known = ", ".join(names.VARIANT_FALLBACKS)
            raise ValueError(f"variant {options.variant!r} is not one of {known}")
        self.options = options
        normal = {number: {name.replace("_", " ").casefold() for name in names} for number, names in namespaces.items()}
        self._dropped_prefixes = names.FILE_NAMESPACES | normal.get(6, set()) | names.CATEGORY_NAMESPACES
        self._dropped_prefixes |= normal.get(14, set()) | names.LANGUAGE_PREFIXES
        # a wiki may have a namespace of its own whose name is a language code elsewhere
        own = set().union(*(names for number, names in normal.items() if number not in (6, 14)))
        self._dropped_prefixes -= own
        self._hidden_prefixes = names.PROJECT_PREFIXES - own

    def clean(self, markup: str, title: str = "") -> str:
        """The page's prose; "" for a redirect. ``title`` is what {{PAGENAME}} shows. Never raises on any markup."""
        if REDIRECT.match(markup):
            return ""
        for character in PLACEHOLDERS:
            if character in markup:
                markup = markup.replace(character, "")
        literals: list[str] = []
        text = f"\n{markup}\n"
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "<" in text:
            text = self._without_tags(text, literals)
        if not self.options.sections and "==" in text:
            text = _without_back_matter(text)
        if "[[" in text:
            text = "".join(
                SIMPLE_LINK.split(text)
            )  # the words of each link stand between the pieces; sub(r"\1") takes twice as long
        if any(token in text for token in HAS_TOKENS):
            text = self._resolve(text, title)
        if "[" in text:
            text = OPEN_EXTERNAL_LINK.sub("", EXTERNAL_LINK.sub(lambda link: link[1] or DROPPED, text))
        if "''" in text:
            text = "\n".join([_without_quotes(line) if "''" in line else line for line in text.split("\n")])
        if "__" in text:
            text = MAGIC_WORD.sub(_magic_word, text)
        if DROPPED in text:
            text = _mend(text.split(DROPPED))
        text = _layout(text.split("\n"))
        if "&" in text:
            text = CODED_CHARACTER.sub(_decoded, text)
        return _finish(text, literals)

    def is_disambiguation(self, markup: str) -> bool:
        """Whether the page only lists pages of like names: it calls {{disambig}}, {{消歧义}}, {{Begriffsklärung}} or the like."""
        if "__DISAMBIG__" in markup:
            return True
        return any(template_name(name) in names.DISAMBIGUATION_TEMPLATES for name in TEMPLATE_NAME.findall(markup))

    def _without_tags(self, text: str, literals: list[str]) -> str:
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

    def _resolve(self, text: str, title: str) -> str:
        """Templates, links, tables and variants, in one pass over the tokens."""
        first, *pieces = (TOKEN_WITH_VARIANTS if "-{" in text else TOKEN).split(text)
        stack = _Stack(first)
        language = _language(text)
        for token, following in zip(pieces[::2], pieces[1::2], strict=True):
            if token == "[[":
                stack.open("[[", OPEN_LINK)
            elif token[0] == "]":
                self._close_links(stack, len(token))
            elif token.startswith("{{"):
                stack.open_braces(len(token))
            elif token.startswith("}}"):
                for body in stack.close_braces(len(token)):
                    stack.add(self._template(body, title, language))
            elif token == "-{":
                stack.open("-{", "")
            elif token == "}-":
                if (body := stack.close("-{", barrier="{|")) is not None:
                    stack.add(_variant(body, self.options.variant))
            elif token[-1] == "|":  # {|
                stack.add("\n" * token.count("\n"))
                stack.open("{|", OPEN_TABLE)
            elif token[-1] == "}":  # |}
                if (body := stack.close("{|")) is not None:
                    stack.add(_table(body) if self.options.tables else DROPPED)
            else:  # the line end before a heading
                stack.give_up()
                stack.add(token)
            stack.out.append(following)
        return _without_open(stack.text())

    def _close_links(self, stack: "_Stack", brackets: int) -> None:
        for count in range(brackets // 2):
            body = stack.close("[[", barrier="{|")
            if body is None:
                return
            if count == 0 and brackets % 2 and body.count("[") > body.count("]"):
                body += "]"  # [[File:a.jpg|[http://a words]]]
            stack.add(self._link(body))

    def _link(self, body: str) -> str:
        target, pipe, text = body.partition("|")
        prefix, colon, rest = target.partition(":")
        if colon:
            prefix = prefix.replace("_", " ").strip(" \u200e\u200f").casefold()
            if not prefix:  # [[:Category:Bread]], which shows as a link
                return text or rest
            if prefix in self._dropped_prefixes:
                return DROPPED
            if prefix in self._hidden_prefixes:
                target = rest.lstrip(":")
        if not pipe:
            return target.strip().lstrip("#")
        if text.strip():
            return text
        # the pipe trick: [[Help:Bread (food)|]] shows as "Bread"
        return re.sub(r"\s*[(（][^()（）]*[)）]\s*$|,[^,]*$", "", target.rpartition(":")[2]).strip()

    def _template(self, body: str, title: str, language: str) -> str:
        name = template_name(body[:end] if (end := body.find("|")) >= 0 else body)
        if ":" in name and "|" not in name[: name.find(":")]:  # {{lc:WORDS}}, {{#if:…}}
            function, _, argument = body.partition(":")
            name = template_name(function)
            body = f"{function}|{argument}"
        render = renderer(name)
        if render is None:
            if self.options.tables and is_infobox(name):
                return infobox(parse_call(body.replace(BREAK, ", "), title, language, self.options.variant))
            return DROPPED
        return render(parse_call(body, title, language, self.options.variant)) or DROPPED


class _Stack:
    """What is open, and the text so far, ``out``, in pieces.

    Of each open construct it holds the kind and the place in ``out`` of a placeholder for the opening token; when it closes,
    the pieces since then are taken out, to come back as one, rendered.
    """

    def __init__(self, text: str):
        self.out = [text]
        self.kinds: list[str] = []
        self.starts: list[int] = []

    def text(self) -> str:
        return "".join(self.out)

    def open(self, kind: str, placeholder: str) -> None:
        if len(self.kinds) >= MAX_DEPTH:
            # Each level copies the text inside it once more, so endless nesting would take quadratic time.
            del self.kinds[: MAX_DEPTH // 2], self.starts[: MAX_DEPTH // 2]
        self.kinds.append(kind)
        self.starts.append(len(self.out))
        self.out.append(placeholder)

    def close(self, kind: str, barrier: str = "") -> str | None:
        """The text inside the innermost open ``kind``; None if there is none, or none above a ``barrier``.

        What was opened inside and never closed is text.
        """
        if kind not in self.kinds:
            return None
        depth = len(self.kinds) - 1
        while self.kinds[depth] != kind:
            if self.kinds[depth] == barrier:
                return None
            depth -= 1
        start = self.starts[depth]
        body = "".join(self.out[start + 1 :])
        del self.kinds[depth:], self.starts[depth:], self.out[start:]
        return body

    def give_up(self) -> None:
        """At a heading: a table may go on across it, but what else is still open was never meant to."""
        while self.kinds and self.kinds[-1] != "{|":
            self.kinds.pop()
            self.starts.pop()

    def open_braces(self, braces: int) -> None:
        """{{ opens a template, {{{ a parameter; more are some of each."""
        if braces % 3 == 0 and braces % 2:
            self.open("{{{", OPEN_TEMPLATE)
            braces -= 3
        for _ in range(braces // 2):
            self.open("{{", OPEN_TEMPLATE)

    def close_braces(self, braces: int) -> Iterator[str]:
        """The insides of the templates that a run of closing braces ends."""
        while braces >= 2:
            innermost = next((kind for kind in reversed(self.kinds) if kind in ("{{", "{{{")), None)
            if innermost == "{{{" and braces >= 3:
                # On a page that is no template, {{{name|default}}} shows its default.
                self.add((self.close("{{{") or "").partition("|")[2])
                braces -= 3
                continue
            body = self.close("{{")
            if body is None:
                return
            yield body
            braces -= 2

    def add(self, text: str) -> None:
        if self.kinds and self.kinds[-1] == "{{" and text not in ("|", "||"):
            # Inside a call, a pipe of what was rendered would start another argument.
            text = text.replace("|", PIPE).replace("=", EQUALS)
        self.out.append(text)


def _without_open(text: str) -> str:
    """Text with the remains of what was never closed: of a table its first line, of the rest its markup characters."""
    if OPEN_TABLE in text:
        text = re.sub(rf"{OPEN_TABLE}[^\n]*+", "", text)
    if OPEN_TEMPLATE in text or OPEN_LINK in text:
        text = OPEN_LINE.sub(lambda line: ARGUMENT.sub(" ", line[1]), text)
    return text.replace("{|", "").replace("|}", "")


def _power(found: re.Match) -> str:
    before = found.string[max(0, found.start() - 2) : found.start()]
    return f"^{found[1]}" if POWER.search(before) else found[1]


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
    return CODED_CHARACTER.sub(_decoded, body).strip("\n")


def _without_back_matter(text: str) -> str:
    """Cut out the sections that hold no prose, with what is below them."""
    out: list[str] = []
    kept_from = 0
    dropping = 0  # the level of the section that is being dropped
    for heading in HEADING.finditer(text):
        level, title = _heading(heading[1])
        if dropping and level > dropping:
            continue
        if dropping:
            kept_from = heading.start()
            dropping = 0
        title = title.strip(f" '[]:：{DROPPED}").casefold()
        if title in names.SECTIONS and (level <= 2 or title not in names.SUBJECTS):
            out.append(text[kept_from : heading.start()])
            dropping = level
    if dropping:
        return "".join(out) + "\n"
    return "".join(out) + text[kept_from:]


def _heading(line: str) -> tuple[int, str]:
    """(level, title) of ``== title ==``."""
    level = min(len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("=")), 6, (len(line) - 1) // 2)
    return level, line[level : len(line) - level].strip()


def _language(text: str) -> str:
    """ "zh" or "en", as far as words that each page of some length has can tell."""
    if ("。" in text or "，" in text) and "の" not in text:
        return "zh"
    return "en" if " the " in text or text.isascii() else ""


def _table(body: str) -> str:
    """Rows on lines, cells set apart by " | "."""
    rows: list[str] = []
    cells: list[str] = []
    for line in body.split("\n")[1:]:
        line = line.strip()
        mark = line[:1]
        if line.startswith(("|-", "|+")) or (mark not in ("|", "!") and not cells):
            if cells:
                rows.append(" | ".join(filter(None, cells)))
            cells = []
            if line.startswith("|+"):
                rows.append(_cell(line[2:]))
            elif mark and mark != "|":
                rows.append(line)
        elif mark == "|":
            cells += map(_cell, line[1:].split("||"))
        elif mark == "!":
            cells += map(_cell, line[1:].replace("!!", "||").split("||"))
        elif line:
            cells[-1] = f"{cells[-1]} {line.lstrip('*#:; ')}".strip()
    rows.append(" | ".join(filter(None, cells)))
    return "\n" + "\n".join(filter(None, rows)) + "\n"


def _cell(text: str) -> str:
    """A cell's text, without the attributes before it."""
    attributes, pipe, rest = text.partition("|")
    if pipe and ("=" in attributes or not attributes.strip(DROPPED + " ")):
        text = rest
    return "" if ATTRIBUTES.fullmatch(text) else text.replace(BREAK, " ").strip()


_VARIANTS = "|".join(sorted(names.VARIANT_FALLBACKS, key=len, reverse=True))
_RULE = re.compile(rf";\s*(?=(?:{_VARIANTS})\s*:|[^;:]*=>\s*(?:{_VARIANTS})\s*:|$)")
_RULE_PARTS = re.compile(rf"\s*(?:[^;:]*=>\s*)?({_VARIANTS})\s*:(.*)", re.DOTALL)


def _variant(body: str, variant: str) -> str:
    """What ``-{body}-`` shows in a Chinese variant.

    Flags stand before a pipe: A and none at all show the rule, R and a list of variants show the words; H, T, D, N and "-"
    tell the converter something about the rest of the page and show nothing.
    """
    flags, pipe, rule = body.partition("|")
    if not pipe:
        flags, rule = "", body
    flag_set = {flag.strip() for flag in flags.split(";")}
    if flag_set & {"H", "T", "D", "N", "-"} and "A" not in flag_set:
        return ""
    if "R" in flag_set:
        return rule
    texts: dict[str, str] = {}
    for part in _RULE.split(rule):
        if found := _RULE_PARTS.match(part):
            texts[found[1]] = found[2].strip()
    if not texts:
        return rule
    for choice in (variant, *names.VARIANT_FALLBACKS[variant]):
        if choice in texts:
            return texts[choice]
    return next(iter(texts.values()))


def _without_quotes(line: str) -> str:
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


def _magic_word(found: re.Match) -> str:
    word = found[1]
    if word.isascii():
        return "" if word in names.MAGIC_WORDS else found[0]
    return "" if word == word.upper() else found[0]


def _mend(pieces: list[str]) -> str:
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


def _layout(lines: list[str]) -> str:
    """Headings, lists and blank lines."""
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
            level, title = _heading(line)
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


def _decoded(found: re.Match) -> str:
    name = found[1]
    if name[0] == "#":
        code = int(name[2:], 16) if name[1] in "xX" else int(name[1:])
        if code < 32:
            return " "
        return "" if code > 0x10FFFF or 0xD800 <= code < 0xE000 else chr(code)
    return html5.get(name + ";", found[0])


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


def _finish(text: str, literals: list[str]) -> str:
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
