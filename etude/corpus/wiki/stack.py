"""The brackets that are open at a place of a page, paired by a stack. For :mod:`etude.corpus.wiki.wikitext`'s one pass."""

import re
from collections.abc import Iterator

from etude.corpus.wiki.marks import EQUALS, OPEN_LINK, OPEN_TABLE, OPEN_TEMPLATE, PIPE

MAX_DEPTH = 64  # of open constructs; below, the oldest is given up. MediaWiki itself stops at 40
ARGUMENT = re.compile(r"\|(?:[\w \t.\-]*+=)?")  # of a call
OPEN_LINE = re.compile(rf"[{OPEN_TEMPLATE}{OPEN_LINK}]([^\n{OPEN_TEMPLATE}{OPEN_LINK}]*+)")


class Stack:
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


def without_open(text: str) -> str:
    """Text with the remains of what was never closed: of a table its first line, of the rest its markup characters."""
    if OPEN_TABLE in text:
        text = re.sub(rf"{OPEN_TABLE}[^\n]*+", "", text)
    if OPEN_TEMPLATE in text or OPEN_LINK in text:
        text = OPEN_LINE.sub(lambda line: ARGUMENT.sub(" ", line[1]), text)
    return text.replace("{|", "").replace("|}", "")
