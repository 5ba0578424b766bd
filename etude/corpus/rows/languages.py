"""Which script a text is written in, by its characters; and which language, by py3langid, an extra.

Scripts are counted from Unicode's blocks. Simplified and traditional Chinese share most characters; a text counts as the one
of which it holds more of the frequent characters that only one of the two has.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from etude.errors import UsageError

SIMPLIFIED = (
    "这来时国过个为说对发会学经从还没开关们问间见长门东车马鱼鸟龙气汉语话请让谁难题书买卖银钱电脑网处习实现样机动员务业产"
)
TRADITIONAL = (
    "這來時國過個為說對發會學經從還沒開關們問間見長門東車馬魚鳥龍氣漢語話請讓誰難題書買賣銀錢電腦網處習實現樣機動員務業產"
)

SCRIPTS = ("other", "Latin", "Han", "simplified", "traditional", "Kana", "Hangul", "Cyrillic", "Greek", "Arabic", "Hebrew",
           "Indic", "Thai")  # fmt: skip
BLOCKS = {  # first and last code point
    "Latin": [(0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x2AF),
              (0x1E00, 0x1EFF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)],
    "Greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "Cyrillic": [(0x400, 0x52F)],
    "Hebrew": [(0x590, 0x5FF)],
    "Arabic": [(0x600, 0x6FF), (0x750, 0x77F), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)],
    "Indic": [(0x900, 0xDFF)],
    "Thai": [(0xE00, 0xE7F)],
    "Hangul": [(0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)],
    "Kana": [(0x3041, 0x309F), (0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)],
    "Han": [(0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)],
}  # fmt: skip


def codes_of(texts: Sequence[str]):
    """Code points of ``texts``, each followed by a line end, as one array (C,), and where each text starts in it (D,)."""
    import numpy as np

    joined = "\n".join(texts) + "\n"
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    starts = np.zeros(len(texts), np.int64)
    np.cumsum(lengths[:-1] + 1, out=starts[1:])
    return np.frombuffer(joined.encode("utf-32-le"), np.uint32), starts


@lru_cache(maxsize=1)
def script_table():
    """Index into SCRIPTS of every code point, as an array."""
    import numpy as np

    table = np.zeros(0x110000, np.uint8)
    for script, blocks in BLOCKS.items():
        for first, last in blocks:
            table[first : last + 1] = SCRIPTS.index(script)
    for script, characters in (("simplified", SIMPLIFIED), ("traditional", TRADITIONAL)):
        table[list(map(ord, characters))] = SCRIPTS.index(script)
    return table


def count_scripts(texts: Sequence[str]):
    """Characters of each text in each of SCRIPTS, as an array (D, S)."""
    import numpy as np

    codes, starts = codes_of(texts)
    lengths = np.diff(starts, append=len(codes))
    of_text = np.repeat(np.arange(len(texts)) * len(SCRIPTS), lengths)
    counts = np.bincount(of_text + script_table()[codes], minlength=len(texts) * len(SCRIPTS))
    return counts.reshape(len(texts), len(SCRIPTS))


def main_scripts(counts) -> list[str]:
    """The script that most letters of each text are in, from :func:`count_scripts`; "none" for a text without letters.

    Chinese is "simplified", "traditional", or "Han" where nothing tells; Japanese, Kana among Han, is "Kana".
    """
    found = []
    for row in counts.tolist():
        of = dict(zip(SCRIPTS, row, strict=True))
        del of["other"]
        simplified, traditional = of.pop("simplified"), of.pop("traditional")
        of["Han"] += simplified + traditional
        if of["Kana"] * 10 > of["Han"]:
            of["Kana"] += of.pop("Han")
        script = max(of, key=of.__getitem__)
        if not of[script]:
            script = "none"
        elif script == "Han" and simplified != traditional:
            script = "simplified" if simplified > traditional else "traditional"
        found.append(script)
    return found


@lru_cache(maxsize=1)
def language_guesser() -> Callable[[str], str]:
    """A function from text to the ISO 639-1 code of its most likely language, of 97; it reads the first 1,000 characters.

    Raises :class:`UsageError` where the package is missing. After Lui and Baldwin, "langid.py: An Off-the-shelf Language
    Identification Tool" (2012).
    """
    try:
        import py3langid
    except ImportError:
        raise UsageError("telling languages needs a package: pip install py3langid (or go by --scripts)") from None
    return lambda text: py3langid.classify(text[:1000])[0]
