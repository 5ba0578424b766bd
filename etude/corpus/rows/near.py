"""Near-duplicates: texts that share most of their shingles, found without comparing every text with every other.

A text is the set of its shingles, runs of ``ngram`` words; Han characters and kana count as words, letter case and
punctuation do not. MinHash (A. Broder, "On the resemblance and containment of documents", 1997) turns the set into a
signature of ``num_perm`` numbers: the share of places in which two signatures agree estimates the sets' Jaccard similarity,
give or take √(J(1-J)/num_perm), 0.035 at J = 0.8. Texts whose signatures agree in a whole band of places are candidates
(J. Leskovec, A. Rajaraman, J. Ullman, "Mining of Massive Datasets", chapter 3), and each candidate's estimate is looked at.

The signatures are rensa's. Measured on 720,000 shingles on one core: rensa 0.5 takes 14 ns a shingle, datasketch 2.0 770 ns;
neither is biased, and rensa's estimates scatter less (0.028 against 0.038 at J = 0.8, theory 0.036). rensa gave the same
signatures in every process; but 0.4 and 0.5 give different ones, so that another version may decide otherwise on a pair at
the threshold. That is why its version is to be 0.5, and told.

On the disk: 4 × num_perm + 8 bytes a text (520), and 12 a band (216 for the default 18). In memory: 4 bytes a text, about
20 a text that has near-duplicates, and a 256th of the bands, about 2 bytes a text; besides, signatures that are compared
are mapped from the disk, up to some 130 MB that the system takes back when it needs them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from etude.cli import option
from etude.corpus.output import tell
from etude.corpus.rows.external import Scatter, changes
from etude.corpus.rows.options import JobConfig, require_at_least
from etude.errors import UsageError

SEED = 0  # of the permutations; fixed, so that a text has one signature
RECALL = 0.98  # of the pairs at the threshold that become candidates, at least
CHUNK = 2**14  # signatures in memory at once: 8 MiB at 128 places
LEADERS = 1000  # texts of one bucket that are compared with all the others in it
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3040-\u30ff"
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+")


@dataclass(frozen=True)
class NearConfig(JobConfig):
    """A job that looks for copies of texts, and by option for near-duplicates."""

    text_key: str = option("text", "key of a row's text")
    near: bool = option(False, "look for near-duplicates as well (needs rensa)")
    threshold: float = option(0.8, "near-duplicates: Jaccard similarity of the sets of shingles, above 0, up to 1")
    ngram: int = option(5, "near-duplicates: words in a shingle; a Han character is a word")
    num_perm: int = option(128, "near-duplicates: numbers in a signature; more estimate better, 4 bytes a row each")
    workers: int = option(0, "near-duplicates: processes; 0: all cores")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise UsageError(f"threshold ({self.threshold}) must be above 0 and at most 1")
        require_at_least(1, self, "ngram", "num_perm")
        require_at_least(0, self, "workers")
        if self.near:
            rensa()


def rensa() -> Any:
    """The library. Raises :class:`UsageError` where it is absent."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the worker processes are the parallel part
    try:
        import rensa
    except ImportError:
        raise UsageError('near-duplicates need a package: pip install "rensa>=0.5,<0.6"') from None
    return rensa


def bands_of(threshold: float, num_perm: int) -> tuple[int, int]:
    """(bands, places in a band): the longest band, thus the fewest false candidates, that keeps :data:`RECALL`."""
    for rows in range(num_perm, 1, -1):
        if candidate_share(threshold, num_perm // rows, rows) >= RECALL:
            return num_perm // rows, rows
    return num_perm, 1


def candidate_share(jaccard: float, bands: int, rows: int) -> float:
    """The share of the pairs of this similarity that agree in some band: 1 - (1 - J^rows)^bands."""
    return 1 - (1 - jaccard**rows) ** bands


def tell_near(config: NearConfig) -> None:
    """Say how near-duplicates were sought."""
    from importlib.metadata import version

    bands, rows = bands_of(config.threshold, config.num_perm)
    share = candidate_share(config.threshold, bands, rows)
    tell(
        f"near      {config.threshold:g} of the {config.ngram}-word shingles in common, by {bands} bands of {rows}, which "
        f"compare {share:.1%} of the pairs so alike (rensa {version('rensa')})"
    )


@lru_cache(maxsize=2**17)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")


def shingles(text: str, ngram: int) -> Any:
    """A 64-bit hash of each run of ``ngram`` words (uint64); one run if there are fewer words, none if there is no word."""
    import numpy as np

    words = WORD.findall(text.casefold())
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    length = min(ngram, len(words))
    runs = np.zeros(max(0, len(words) - length + 1) if words else 0, np.uint64)
    for place in range(length):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + len(runs)]  # modulo 2^64
    return runs


def signatures(texts: Sequence[str], ngram: int, num_perm: int) -> tuple[Any, Any]:
    """(which texts have words (numbers), their signatures (texts, num_perm) uint32)."""
    import numpy as np

    sets = [shingles(text, ngram) for text in texts]
    numbers = [number for number, members in enumerate(sets) if len(members)]
    if not numbers:
        return np.empty(0, np.int64), np.empty((0, num_perm), np.uint32)
    sets = [sets[number] for number in numbers]
    ends = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    matrix = rensa().RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), ends, num_perm, SEED)
    return np.array(numbers, np.int64), np.array(matrix.to_rows(), np.uint32)


class NearIndex:
    """Signatures of lines, on the disk, and the groups of lines that are near-duplicates of each other."""

    def __init__(self, folder: Path, threshold: float, num_perm: int):
        folder.mkdir()
        self.threshold, self.num_perm, self.count = threshold, num_perm, 0
        self._folder = folder
        self._lines_file, self._signatures_file = open(folder / "lines", "wb"), open(folder / "signatures", "wb")

    def add(self, lines: Any, signatures: Any) -> None:
        """Lines' numbers, ascending, and their signatures."""
        self._lines_file.write(lines.astype("i8").tobytes())
        self._signatures_file.write(signatures.astype("u4").tobytes())
        self.count += len(lines)

    def finish(self) -> None:
        """Write the last of it; before this nothing can be asked."""
        self._lines_file.close()
        self._signatures_file.close()

    def lines(self) -> Any:
        """The number of each line, by its place in this index."""
        import numpy as np

        return np.memmap(self._folder / "lines", "i8", "r") if self.count else np.empty(0, np.int64)

    def signatures(self) -> Any:
        """(texts, num_perm), mapped from the disk. Let go of it soon: pages once read count as this process's memory."""
        import numpy as np

        return np.memmap(self._folder / "signatures", "u4", "r", shape=(self.count, self.num_perm))

    def alike(self, ones: Any, others: Any) -> Any:
        """The estimated Jaccard similarity of each pair."""
        import numpy as np

        shares = np.empty(len(ones), np.float32)
        for start in range(0, len(ones), CHUNK):
            part, signatures = slice(start, start + CHUNK), self.signatures()
            shares[part] = (signatures[ones[part]] == signatures[others[part]]).mean(1)
        return shares

    def groups(self) -> "Groups":
        """Join every two candidates that are alike enough."""
        import numpy as np

        groups = Groups(self.count)
        buckets = self._buckets()
        for part in range(256):
            records = buckets.load(part)
            records = records[np.argsort(records["key"], kind="stable")]  # within a bucket in the order of the lines
            texts, starts = records["text"], np.flatnonzero(changes(records["key"]))
            lengths = np.diff(starts, append=len(texts))
            firsts = np.repeat(texts[starts], lengths)
            self._join(groups, firsts, texts)
            apart = groups.roots(texts) != groups.roots(firsts)
            for bucket in np.unique(np.repeat(np.arange(len(starts)), lengths)[apart]):
                self._join_within(groups, texts[starts[bucket] : starts[bucket] + lengths[bucket]])
        return groups

    def _join(self, groups: "Groups", ones: Any, others: Any) -> None:
        open_pairs = groups.roots(ones) != groups.roots(others)
        ones, others = ones[open_pairs], others[open_pairs]
        alike = self.alike(ones, others) >= self.threshold
        for one, other in zip(ones[alike].tolist(), others[alike].tolist(), strict=True):
            groups.join(one, other)

    def _join_within(self, groups: "Groups", texts: Any) -> None:
        """Every text of a bucket against every other of another group; the first has been."""
        import numpy as np

        for place in range(1, min(LEADERS, len(texts) - 1)):
            rest = texts[place + 1 :]
            self._join(groups, np.full_like(rest, texts[place]), rest)
            if len(np.unique(groups.roots(texts))) == 1:
                return

    def _buckets(self) -> Scatter:
        """The key of each text in each band, texts of equal keys in one file."""
        import numpy as np

        bands, rows = bands_of(self.threshold, self.num_perm)
        buckets = Scatter(self._folder / "bands", [("key", "u8"), ("text", "u4")])
        for start in range(0, self.count, CHUNK):
            signatures = np.array(self.signatures()[start : start + CHUNK], np.uint64)
            texts = np.arange(start, start + len(signatures))
            for band in range(bands):
                keys = np.full(len(texts), band + 1, np.uint64)
                for place in range(band * rows, (band + 1) * rows):
                    keys = (keys ^ signatures[:, place]) * np.uint64(0x9E3779B97F4A7C15)
                    keys ^= keys >> np.uint64(32)
                buckets.add((keys >> np.uint64(56)).astype(np.int64), key=keys, text=texts)
        return buckets

    def copies(self) -> Iterator[tuple[Any, Any, Any]]:
        """(lines left out, the kept lines that they are near-duplicates of, the similarities), as arrays.

        Of a group the first line is kept, and every further one that is like no kept one: resemblance is not transitive,
        and what is left out shall be like something that stays.
        """
        groups, lines = self.groups(), self.lines()
        firsts, members = groups.members()
        while len(members):
            shares = self.alike(firsts, members)
            out = shares >= self.threshold
            yield lines[members[out]], lines[firsts[out]], shares[out]
            firsts, members = _next_leaders(firsts[~out], members[~out])


def _next_leaders(firsts: Any, members: Any) -> tuple[Any, Any]:
    """What is left of each group, of which ``firsts`` was the first text: the next one leads, the others follow."""
    import numpy as np

    new = changes(firsts)
    starts = np.flatnonzero(new)
    leaders = np.repeat(members[starts], np.diff(starts, append=len(members)))
    return leaders[~new], members[~new]


class Groups:
    """Disjoint sets of the numbers below ``count`` (union-find), 4 bytes each; a set's root is its smallest number."""

    def __init__(self, count: int):
        import numpy as np

        if count >= 2**32:
            raise UsageError(f"{count:,} texts are more than near-duplicates can be sought in at once (2^32)")
        self._parents = np.arange(count, dtype=np.uint32)

    def roots(self, numbers: Any) -> Any:
        """The root of each number's set."""
        roots = self._parents[numbers]
        while (roots != (above := self._parents[roots])).any():
            roots = above
        self._parents[numbers] = roots
        return roots

    def join(self, one: int, other: int) -> None:
        """Make the sets of two numbers one."""
        parents = self._parents
        one, other = self._root(one), self._root(other)
        parents[max(one, other)] = min(one, other)

    def _root(self, number: int) -> int:
        parents = self._parents
        while (above := int(parents[number])) != number:
            parents[number] = parents[above]
            number = int(parents[above])
        return number

    def members(self) -> tuple[Any, Any]:
        """(root, member) of every number that is not its set's root, sorted by root, then by member."""
        import numpy as np

        chunks = [np.arange(start, min(start + 2**20, len(self._parents))) for start in range(0, len(self._parents), 2**20)]
        pairs = [(roots[roots != chunk], chunk[roots != chunk]) for chunk in chunks for roots in [self.roots(chunk)]]
        if not pairs:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        firsts, members = (np.concatenate(column) for column in zip(*pairs, strict=True))
        order = np.argsort(firsts, kind="stable")
        return firsts[order], members[order].astype(np.uint32)
