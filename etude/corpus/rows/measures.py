"""Figures about texts that quality rules put limits to, many texts at once.

After Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher" (2021), section A1.1 and table
A1. What a word is, :mod:`etude.corpus.rows.words` says. Legend: D texts, C characters, W words.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from etude.corpus.rows.words import ALONE, DIGIT, LETTER, SEPARATOR, SYMBOL, Hashed, characters_of, hashes_of, words_of

STOP_WORDS = re.compile(r"\b(the|be|to|of|and|that|have|with)\b", re.IGNORECASE | re.ASCII)  # Gopher's eight
CHINESE_STOP_WORDS = re.compile("[的了是在不和有我这這一之也而以]")  # spoken and literary
BULLET = re.compile(r"\s*(?:[-*•‣◦▪●○■□·‧]|[0-9]{1,3}[.、)）])")
SENTENCE_END = re.compile(r"[.!?。！？]+(?:(?<=[。！？])|(?=[\"'”’)\]]*(?:\s|$)))")


class Texts:
    """Some texts, none of them empty, measured when asked. Every figure is an array (D,)."""

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        self.failed: set[int] = set()  # texts that need no exact figures any more

    def each(self, function: Callable[[str], float]):
        """``function`` of every text."""
        import numpy as np

        return np.fromiter(map(function, self.texts), np.float64, len(self.texts))

    @cached_property
    def _characters(self):
        return characters_of(self.texts)

    @cached_property
    def _words(self):
        return words_of(self._characters)

    @cached_property
    def _hashed(self) -> Hashed:
        return Hashed(hashes_of(self._characters, self._words), self._words.lengths, self._words.bounds)

    def share_of(self, bit: int):
        """Of the characters that are no white space, those of a class."""
        import numpy as np

        _, classes, starts = self._characters
        visible = np.add.reduceat(classes != SEPARATOR, starts, dtype=np.int64)
        return np.add.reduceat((classes & bit) != 0, starts, dtype=np.int64) / np.maximum(visible, 1)

    @cached_property
    def words(self):
        import numpy as np

        return np.diff(self._words.bounds)

    @cached_property
    def _alone(self):
        """Words (W,) that are a Han or Kana character."""
        return (self._characters.classes[self._words.first] & ALONE) != 0

    @cached_property
    def mostly_alone(self):
        """Texts that consist of Han and Kana more than of words of letters."""
        return 2 * self._words.sums(self._alone) > self.words

    @cached_property
    def mean_word_chars(self):
        """Characters a word, over words of letters; not a number (no limit applies) where these are the lesser part."""
        import numpy as np

        spelt = ~self._alone
        count, chars = self._words.sums(spelt), self._words.sums(self._words.lengths * spelt)
        return np.where(self.mostly_alone | (count == 0), np.nan, chars / np.maximum(count, 1))

    @cached_property
    def alphabetic_words(self):
        """Share of words with a letter, or a Han character, in them."""
        import numpy as np

        letters = np.zeros(len(self._characters.classes) + 1, np.int32)
        np.cumsum((self._characters.classes & LETTER) != 0, out=letters[1:])
        first, lengths, _ = self._words
        return self._words.sums(letters[first + lengths] > letters[first]) / np.maximum(self.words, 1)

    @cached_property
    def symbols_per_word(self):
        """Hash signs and ellipses by words; the double ellipsis of Chinese counts once."""
        import numpy as np

        def count(text: str) -> int:
            return text.count("#") + text.count("...") + text.count("…") - text.count("……")

        return self.each(count) / np.maximum(self.words, 1)

    def stop_words(self, limit: float):
        """Different stop words in a text, counted up to ``limit``."""

        def count(text: str, chinese: bool) -> int:
            found: set[str] = set()
            for match in (CHINESE_STOP_WORDS if chinese else STOP_WORDS).finditer(text):
                found.add(match[0].lower())
                if len(found) >= limit:
                    break
            return len(found)

        chinese = iter(self.mostly_alone.tolist())
        return self.each(lambda text: count(text, next(chinese)))

    @cached_property
    def lines(self) -> list[list[str]]:
        """The lines of each text that are not blank."""
        return [list(filter(str.strip, text.split("\n"))) for text in self.texts]

    @cached_property
    def paragraphs(self) -> list[list[str]]:
        """What stands between blank lines."""
        return [list(filter(str.strip, text.split("\n\n"))) for text in self.texts]

    def over(self, parts: list[list[str]], function: Callable[[list[str]], float]):
        """``function`` of the parts of every text; 0 where there are none."""
        import numpy as np

        return np.fromiter((function(part) if part else 0.0 for part in parts), np.float64, len(parts))

    def top_ngram(self, n: int, limit: float):
        """Share of word characters in the n-gram that takes most of them. Where a bound proves it within ``limit``, the bound."""
        if n == 2:
            return self._top_2gram
        # An n-gram of 3 or 4 words is covered by two of 2 words, each at least as frequent.
        return self._refined(2 * self._top_2gram, limit, lambda words: words.top_share(n))

    def repeated_ngrams(self, n: int, limit: float):
        """Share of word characters in n-grams, n from 5, that an equal one came before. Where a bound proves it within
        ``limit``, the bound."""
        if n == 5:
            return self._repeated_5grams
        # What repeats of more words cover, repeats of fewer cover as well.
        return self._refined(self._repeated_5grams, limit, lambda words: words.repeated_share(n))

    @cached_property
    def _top_2gram(self):
        return self._hashed.top_share(2)

    @cached_property
    def _repeated_5grams(self):
        return self._hashed.repeated_share(5)

    def _refined(self, bound, limit: float, exact: Callable[[Hashed], Any]):
        """``bound``, but the ``exact`` figure of the texts where that is above ``limit``."""
        import numpy as np

        above = np.array([number for number in np.flatnonzero(bound > limit).tolist() if number not in self.failed], np.int64)
        if not len(above):
            return bound
        found = bound.copy()
        found[above] = exact(self._hashed.only(above))
        return found


def repeated_share(parts: list[str]) -> float:
    """Share of the parts that an equal one came before."""
    return 1 - len(set(parts)) / len(parts) if len(parts) > 1 else 0.0


def repeated_chars_share(parts: list[str]) -> float:
    """The same by characters."""
    once = set(parts)
    return 1 - sum(map(len, once)) / sum(map(len, parts)) if len(once) < len(parts) else 0.0


def share(test: Callable[[str], Any]) -> Callable[[list[str]], float]:
    """The share of parts that pass ``test``."""
    return lambda parts: sum(map(bool, map(test, parts))) / len(parts)


def ends_in_ellipsis(line: str) -> bool:
    return line.rstrip().endswith(("...", "…"))


# Name → figure of each text, given the limit that it will be compared with. A limit is an option min_NAME or max_NAME.
MEASURES: dict[str, Callable[[Texts, float], Any]] = {
    "chars": lambda texts, _: texts.each(len),
    "words": lambda texts, _: texts.words,
    "sentences": lambda texts, _: texts.each(lambda text: sum(1 for _ in SENTENCE_END.finditer(text))),
    "line_chars": lambda texts, _: texts.over(texts.lines, lambda lines: max(map(len, lines))),
    "mean_line_chars": lambda texts, _: texts.over(texts.lines, lambda lines: sum(map(len, lines)) / len(lines)),
    "symbols": lambda texts, _: texts.share_of(SYMBOL),
    "digits": lambda texts, _: texts.share_of(DIGIT),
    "mean_word_chars": lambda texts, _: texts.mean_word_chars,
    "symbols_per_word": lambda texts, _: texts.symbols_per_word,
    "bullet_lines": lambda texts, _: texts.over(texts.lines, share(BULLET.match)),
    "ellipsis_lines": lambda texts, _: texts.over(texts.lines, share(ends_in_ellipsis)),
    "alphabetic_words": lambda texts, _: texts.alphabetic_words,
    "stop_words": Texts.stop_words,
    "repeated_lines": lambda texts, _: texts.over(texts.lines, repeated_share),
    "repeated_paragraphs": lambda texts, _: texts.over(texts.paragraphs, repeated_share),
    "repeated_line_chars": lambda texts, _: texts.over(texts.lines, repeated_chars_share),
    "repeated_paragraph_chars": lambda texts, _: texts.over(texts.paragraphs, repeated_chars_share),
    **{f"top_{n}gram": (lambda texts, limit, n=n: texts.top_ngram(n, limit)) for n in (2, 3, 4)},
    **{f"repeated_{n}grams": (lambda texts, limit, n=n: texts.repeated_ngrams(n, limit)) for n in range(5, 11)},
}
