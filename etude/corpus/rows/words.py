"""Texts as arrays of words, and how much of them repeats; many texts at once.

A word is a Han or Kana character, or else a run of characters between white space and Chinese punctuation: so English is
counted as its papers count it, and Chinese by characters. Repetition after Rae et al., "Scaling Language Models: Methods,
Analysis & Insights from Training Gopher" (2021), table A1.

Legend: D texts, C characters, W words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

from etude.corpus.rows.languages import codes_of

SEPARATOR, ALONE, LETTER, DIGIT, SYMBOL = 1, 2, 4, 8, 16  # what a character can be, as bits
LONG = 64  # characters; longer words (a base64 block) are hashed one by one
FACTORS = (0x9E3779B97F4A7C15, 0xD1342543DE82EF95)  # odd 64-bit numbers whose products scatter well


@lru_cache(maxsize=1)
def character_classes():
    """The bits above of every code point, as an array. Beyond the first plane only Han characters are told from symbols."""
    import unicodedata

    import numpy as np

    table = np.full(0x110000, SYMBOL, np.uint8)
    for code in range(0x10000):
        character = chr(code)
        category = unicodedata.category(character)
        if character.isspace() or category == "Cc":
            table[code] = SEPARATOR
        elif category[0] in "LM":
            table[code] = LETTER
        elif category[0] == "N":
            table[code] = DIGIT
        elif category[0] == "P" and (0x3000 <= code < 0x3100 or 0xFF00 <= code < 0xFFF0 or character in "“”…—·"):
            table[code] = SYMBOL | SEPARATOR
    for first, last in (
        (0x3005, 0x3007),
        (0x3041, 0x3096),
        (0x30A1, 0x30FA),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF),
    ):
        table[first : last + 1] = LETTER | ALONE
    table[0x20000:0x40000] = LETTER | ALONE
    return table


class Characters(NamedTuple):
    codes: Any  # (C,) code points; a line end after each text
    classes: Any  # (C,) bits
    starts: Any  # (D,) where each text begins


def characters_of(texts: Sequence[str]) -> Characters:
    codes, starts = codes_of(texts)
    return Characters(codes, character_classes()[codes], starts)


class Words(NamedTuple):
    first: Any  # (W,) where a word begins among the characters
    lengths: Any  # (W,) characters of it
    bounds: Any  # (D + 1,) where each text's words begin; last, how many there are

    def sums(self, values):
        """Sums (D,) over each text's words of ``values`` (W,)."""
        import numpy as np

        sums = np.zeros(len(values) + 1, np.int64)
        np.cumsum(values, out=sums[1:])
        return sums[self.bounds[1:]] - sums[self.bounds[:-1]]


def words_of(characters: Characters) -> Words:
    import numpy as np

    apart, alone = (characters.classes & SEPARATOR) != 0, (characters.classes & ALONE) != 0
    begins = ~apart
    ends = begins.copy()
    begins[1:] &= apart[:-1] | alone[:-1] | alone[1:]
    ends[:-1] &= apart[1:] | alone[1:] | alone[:-1]
    first, last = np.flatnonzero(begins), np.flatnonzero(ends)
    return Words(first, last - first + 1, np.searchsorted(first, np.append(characters.starts, len(apart))))


def hashes_of(characters: Characters, words: Words):
    """A 64-bit number for each word (W,), equal for equal words."""
    import numpy as np

    codes = characters.codes
    # Two bytes a character, the few beyond the first plane folded onto codes that texts do not use; so one 64-bit number,
    # read wherever a word begins, holds four characters of it.
    narrow = np.zeros(len(codes) + LONG, "<u2")
    narrow[: len(codes)] = codes ^ codes >> np.uint32(16)
    fours = np.ndarray(len(codes) + LONG - 3, "<u8", buffer=narrow, strides=(2,))
    masks = np.array([0, 2**16 - 1, 2**32 - 1, 2**48 - 1, 2**64 - 1], np.uint64)
    hashes = (fours[words.first] & masks[np.minimum(words.lengths, 4)]) * np.uint64(FACTORS[0])
    longer = np.flatnonzero((words.lengths > 4) & (words.lengths <= LONG))
    at, left = words.first[longer] + 4, words.lengths[longer] - 4
    while len(longer):
        values = hashes[longer]
        values ^= values >> np.uint64(29)
        values ^= fours[at] & masks[np.minimum(left, 4)]
        values *= np.uint64(FACTORS[1])
        hashes[longer] = values
        going_on = np.flatnonzero(left > 4)
        longer, at, left = longer[going_on], at[going_on] + 4, left[going_on] - 4
    for number in np.flatnonzero(words.lengths > LONG).tolist():
        word = codes[words.first[number] :][: words.lengths[number]]
        hashes[number] = int.from_bytes(blake2b(word.tobytes(), digest_size=8).digest(), "little")
    return hashes


@dataclass
class Hashed:
    """Words of some texts, to find repetition in."""

    hashes: Any  # (W,)
    lengths: Any  # (W,)
    bounds: Any  # (D + 1,)

    def only(self, texts) -> "Hashed":
        """The words of some of the texts, given by an array of their numbers."""
        import numpy as np

        counts = self.bounds[texts + 1] - self.bounds[texts]
        bounds = np.concatenate(([0], np.cumsum(counts)))
        places = np.arange(bounds[-1]) + np.repeat(self.bounds[texts] - bounds[:-1], counts)
        return Hashed(self.hashes[places], self.lengths[places], bounds)

    @cached_property
    def ends(self):
        """Characters of all words before each word, and in all at the end (W + 1,)."""
        import numpy as np

        return np.concatenate(([0], np.cumsum(self.lengths)))

    @cached_property
    def characters(self):
        """Characters of each text's words (D,), at least 1 to divide by."""
        import numpy as np

        return np.maximum(np.diff(self.ends[self.bounds]), 1)

    def top_share(self, n: int):
        """Share (D,) of the characters of each text's words in the n-gram that takes most of them; 0 if none occurs twice."""
        import numpy as np

        keys, again, place_bits = self._sorted_ngrams(n)
        runs = np.flatnonzero(np.diff(again, prepend=-1) != 1)  # an n-gram's first repeat; the first of all stands before it
        counts = np.diff(runs, append=len(again)) + 1
        first = (keys[again[runs] - 1] & place_bits).astype(np.int64)
        top = np.zeros(len(self.bounds) - 1)
        text = np.searchsorted(self.bounds, first, side="right") - 1
        np.maximum.at(top, text, counts * (self.ends[first + n] - self.ends[first]))
        return np.minimum(top / self.characters, 1)  # "a a a" holds "a a" twice

    def repeated_share(self, n: int):
        """Share (D,) of the characters of each text's words that stand in an n-gram which an equal one came before; each
        character counts once."""
        import numpy as np

        keys, again, place_bits = self._sorted_ngrams(n)
        begins = np.zeros(len(self.hashes), bool)
        begins[(keys[again] & place_bits).astype(np.int64)] = True
        covered = begins.copy()
        for place in range(1, n):
            covered[place:] |= begins[:-place]
        sums = np.concatenate(([0], np.cumsum(self.lengths * covered)))
        return np.diff(sums[self.bounds]) / self.characters

    def _sorted_ngrams(self, n: int):
        """A number for each n-gram, sorted, so that equal ones of a text stand side by side, in their order; where one equals
        the one before; and the lower bits of the numbers, which hold the place where the n-gram begins.

        The upper bits hold a hash, 46 bits of it in a batch of 200,000 words: two different n-grams are mixed up once in 3,000
        such batches.
        """
        import numpy as np

        count = max(len(self.hashes) - n + 1, 0)
        keys = np.repeat(np.arange(len(self.bounds) - 1, dtype=np.uint64), np.diff(self.bounds))[:count]
        for place in range(n):
            keys *= np.uint64(FACTORS[1])
            keys += self.hashes[place : place + count]
        keys ^= keys >> np.uint64(32)
        keys *= np.uint64(FACTORS[0])  # so that the upper bits depend on all
        place_bits = np.uint64(2 ** count.bit_length() - 1)
        keys &= ~place_bits
        keys |= np.arange(count, dtype=np.uint64)
        over_an_end = self.bounds[1:-1, None] - np.arange(1, n)  # n-grams that reach into the next text
        keys = np.delete(keys, np.unique(over_an_end[(over_an_end >= 0) & (over_an_end < count)]))
        keys.sort()
        return keys, np.flatnonzero((keys[1:] ^ keys[:-1]) <= place_bits) + 1, place_bits
