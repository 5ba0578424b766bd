"""The text of wiki tables, for those who want it: a row a line, cells set apart by " | "."""

import re

from etude.corpus.wiki.marks import BREAK, DROPPED

ATTRIBUTES = re.compile(rf"(?:\s*+\w++\s?=\s?(?:\"[^\"]*+\"|[^\s\"]++))++[\s{DROPPED}]*+")  # of a cell without text


def table(body: str) -> str:
    """What stands between ``{|`` and ``|}``, without the options of the table, its rows and its cells."""
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
