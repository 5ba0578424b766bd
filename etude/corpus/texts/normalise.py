"""Make text more uniform, one option at a time, each counted: what changes what a person wrote is for that person to ask.

Streams: text is handed on in blocks that end where no step looks further, so a block's result is the same whatever came
before, and memory does not grow with the text.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from etude.cli import option
from etude.errors import UsageError

Step = Callable[[str], tuple[str, int]]  # text → (text, how many of its characters changed)


@dataclass(frozen=True)
class NormaliseConfig:
    """What may be changed in text. Nothing is, unless asked for."""

    mojibake: bool = option(False, "mend text that was once decoded wrongly, such as â€œ for “ (pip install ftfy)")
    line_ends: bool = option(False, "make all line ends \\n: Windows', old Macs', form feeds, Unicode's own")
    control: bool = option(False, "drop control and zero-width characters; the joiners that scripts and emoji need stay")
    nfc: bool = option(False, "compose characters (Unicode NFC): e and an accent become é")
    full_width: bool = option(False, "make full-width letters, digits and signs ASCII; Chinese punctuation stays")
    chinese: Literal["keep", "simplified", "traditional"] = option("keep", "convert Chinese by phrases (pip install opencc)")
    collapse_spaces: bool = option(
        False, "make runs of spaces one, drop those at the ends of lines, leave at most one empty line"
    )


def steps(config: NormaliseConfig) -> dict[str, Step]:
    """The steps that are asked for, by their options' names, in the order in which they are to be taken.

    Raises :class:`UsageError` where one needs a package that is not there.
    """
    known: dict[str, Callable[[], Step]] = {
        "mojibake": _mend_mojibake,
        "line_ends": lambda: _to_newlines,
        "control": lambda: _drop_control,
        "nfc": lambda: _compose,
        "full_width": lambda: _narrow,
        "chinese": lambda: _convert_chinese(config.chinese),
        "collapse_spaces": lambda: _collapse_spaces,
    }
    return {name: make() for name, make in known.items() if getattr(config, name) not in (False, "keep")}


def normalise(text: str, chosen: dict[str, Step], changed: Counter[str]) -> str:
    """``text`` after the ``chosen`` steps; ``changed`` counts, by step, the characters that were not left as they were."""
    for name, step in chosen.items():
        text, count = step(text)
        changed[name] += count
    return text


def normalised(chunks: Iterable[str], chosen: dict[str, Step], changed: Counter[str]) -> Iterator[str]:
    """A text that comes in ``chunks``, normalised; with no step chosen, the chunks themselves."""
    return (normalise(block, chosen, changed) for block in _blocks(chunks)) if chosen else iter(chunks)


BLOCK_CHARACTERS = 2**20  # where no line and no sentence ends for so long, a block ends all the same
_BLOCK_END = re.compile(r"(?s:.*)(?:[\r\n](?=\S)|[。！？](?=[^\s\W]))")  # greedy: the last such place


def _blocks(chunks: Iterable[str]) -> Iterator[str]:
    """``chunks`` joined and cut anew, after the line end or sentence before something that is no space."""
    held = ""
    for chunk in chunks:
        held += chunk
        if end := _BLOCK_END.match(held):
            yield held[: end.end()]
            held = held[end.end() :]
        elif len(held) > BLOCK_CHARACTERS:
            letters = range(len(held) - 1, len(held) - 1024, -1)
            cut = next((at for at in letters if held[at - 1].isalnum() and held[at].isalnum()), len(held))
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _to_newlines(text: str) -> tuple[str, int]:
    return re.subn("\r\n|[\r\x0b\x0c\x85\u2028\u2029]", "\n", text)


# Zero-width joiners and non-joiners shape Arabic, Indic, Khmer, Mongolian, … letters; joiners make one emoji of several.
_JOINING_SCRIPTS = "\u0600-\u0dff\u1000-\u109f\u1780-\u18af\u1a20-\u1aaf\ua840-\ua9ff\uaa60-\uaa7f\ufb50-\ufdff\ufe70-\ufefc"
_EMOJI = "\u2190-\u21ff\u2300-\u27bf\u2b00-\u2bff\ufe0f\u20e3\U0001f000-\U0001faff"
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff]"
    f"|(?<![{_JOINING_SCRIPTS}])\u200c"
    f"|(?<![{_JOINING_SCRIPTS}{_EMOJI}])\u200d"
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0001-\U000e007f]+"  # tags: in flags of regions they stay
)


def _drop_control(text: str) -> tuple[str, int]:
    kept = _CONTROL.sub("", text)
    return kept, len(text) - len(kept)


def _compose(text: str) -> tuple[str, int]:
    if unicodedata.is_normalized("NFC", text):
        return text, 0
    import regex  # comes with transformers

    changed = sum(len(c) for c in regex.findall(r"\X", text) if not unicodedata.is_normalized("NFC", c))
    return unicodedata.normalize("NFC", text), changed


_FULL_WIDTH = re.compile("[\uff02-\uff07\uff0a\uff0b\uff0d-\uff19\uff1c-\uff1e\uff20-\uff5d]")  # without ！（），：；？～


def _narrow(text: str) -> tuple[str, int]:
    return _FULL_WIDTH.subn(lambda match: chr(ord(match[0]) - 0xFEE0), text)


def _mend_mojibake() -> Step:
    try:
        import ftfy
    except ImportError:
        raise UsageError("--mojibake needs a package: pip install ftfy") from None
    return partial(_by_sentence, ftfy.fix_encoding)


def _convert_chinese(variant: str) -> Step:
    try:
        import opencc
    except ImportError:
        raise UsageError("--chinese needs a package: pip install opencc") from None
    return partial(_by_sentence, opencc.OpenCC("t2s" if variant == "simplified" else "s2t").convert)


_SENTENCE = re.compile(
    "[^\r\n。！？]*[\r\n。！？]?"
)  # no longer than a block, so that the count is the same however text comes


def _by_sentence(convert: Callable[[str], str], text: str) -> tuple[str, int]:
    """``text``, each sentence converted; where one changes its length, all between its unchanged ends counts as changed."""
    sentences, changed = _SENTENCE.findall(text), 0
    for number, sentence in enumerate(sentences):
        new = convert(sentence)
        if new != sentence:
            changed += _differing(sentence, new)
            sentences[number] = new
    return "".join(sentences), changed


def _differing(old: str, new: str) -> int:
    if len(old) == len(new):
        return sum(a != b for a, b in zip(old, new, strict=True))
    shorter = min(len(old), len(new))
    before = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    after = next((i for i in range(shorter - before) if old[-1 - i] != new[-1 - i]), shorter - before)
    return len(old) - before - after or len(new) - before - after


_SPACE = "[^\\S\r\n\x0b\x0c\x85\u2028\u2029]"  # white space that ends no line
_SPACES = re.compile(rf"{_SPACE}{{2,}}|{_SPACE}+(?=[\r\n])|(?<=[\r\n]){_SPACE}+")
_EMPTY_LINES = re.compile(r"(\r?\n|\r)(?:\r?\n|\r){2,}")


def _collapse_spaces(text: str) -> tuple[str, int]:
    def collapsed(match: re.Match[str]) -> str:
        at_line_end = match.end() < len(text) and text[match.end()] in "\r\n"
        at_line_start = match.start() > 0 and text[match.start() - 1] in "\r\n"
        return "" if at_line_end or at_line_start else " "

    kept = _EMPTY_LINES.sub(r"\1\1", _SPACES.sub(collapsed, text))
    return kept, len(text) - len(kept)
