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

The steps in their order: ``tags`` takes out what HTML there is; the pass here resolves the rest,
with the help of ``stack``, ``calls``, ``templates`` and ``tables``; ``layout`` makes lines of what is left.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from etude.corpus.wiki import names
from etude.corpus.wiki.calls import parse_call, template_name
from etude.corpus.wiki.layout import finish, laid_out, magic_word, mend, read_heading, without_quotes
from etude.corpus.wiki.marks import BREAK, DROPPED, OPEN_LINK, OPEN_TABLE, PLACEHOLDERS
from etude.corpus.wiki.stack import Stack, without_open
from etude.corpus.wiki.tables import table
from etude.corpus.wiki.tags import CODED_CHARACTER, decoded, without_tags
from etude.corpus.wiki.templates import infobox, is_infobox, renderer


@dataclass(frozen=True)
class WikitextOptions:
    """What to keep of a page."""

    tables: bool = False  # the text of table cells and infoboxes: "cell | cell" a row, "name: value" a line
    sections: bool = False  # "References", "External links", "See also", … and their equivalents in other languages
    variant: str = "zh-hans"  # of Chinese, for -{…}-: zh-hans, zh-hant, zh-cn, zh-tw, zh-hk, zh-mo, zh-sg, zh-my


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
MAGIC_WORD = re.compile(r"__([^\W\d_]{2,40})__")
TEMPLATE_NAME = re.compile(r"\{\{[^\S\n]*+([^|{}\n<]{1,80})[^\S\n]*+(?:\||\}\}|\n)")
REDIRECT = re.compile(rf"\s*+#(?:{names.REDIRECTS})\s?:?\s*+\[\[", re.IGNORECASE)


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
            text = without_tags(text, literals)
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
            text = "\n".join([without_quotes(line) if "''" in line else line for line in text.split("\n")])
        if "__" in text:
            text = MAGIC_WORD.sub(magic_word, text)
        if DROPPED in text:
            text = mend(text.split(DROPPED))
        text = laid_out(text.split("\n"))
        if "&" in text:
            text = CODED_CHARACTER.sub(decoded, text)
        return finish(text, literals)

    def is_disambiguation(self, markup: str) -> bool:
        """Whether the page only lists pages of like names: it calls {{disambig}}, {{消歧义}}, {{Begriffsklärung}} or the like."""
        if "__DISAMBIG__" in markup:
            return True
        return any(template_name(name) in names.DISAMBIGUATION_TEMPLATES for name in TEMPLATE_NAME.findall(markup))

    def _resolve(self, text: str, title: str) -> str:
        """Templates, links, tables and variants, in one pass over the tokens."""
        first, *pieces = (TOKEN_WITH_VARIANTS if "-{" in text else TOKEN).split(text)
        stack = Stack(first)
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
                    stack.add(table(body) if self.options.tables else DROPPED)
            else:  # the line end before a heading
                stack.give_up()
                stack.add(token)
            stack.out.append(following)
        return without_open(stack.text())

    def _close_links(self, stack: Stack, brackets: int) -> None:
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


def _without_back_matter(text: str) -> str:
    """Cut out the sections that hold no prose, with what is below them."""
    out: list[str] = []
    kept_from = 0
    dropping = 0  # the level of the section that is being dropped
    for heading in HEADING.finditer(text):
        level, title = read_heading(heading[1])
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


def _language(text: str) -> str:
    """ "zh" or "en", as far as words that each page of some length has can tell."""
    if ("。" in text or "，" in text) and "の" not in text:
        return "zh"
    return "en" if " the " in text or text.isascii() else ""


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
