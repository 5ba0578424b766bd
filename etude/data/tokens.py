"""Tokenise once: documents → ids in memory-mapped shards, found again by a fingerprint of all that made them.

Layout of a token store: ``store.json``, ``ids-00000.bin`` … (uint16, or uint32 for vocabularies over 65,536),
``mask-00000.bin`` … (uint8, conversations only) and ``starts.bin`` (int64, where each document begins, and the total).
Memory stays flat however large the data is: writing holds a few batches of documents, reading maps the files.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from etude.errors import DataError
from etude.files import whole_folder
from etude.lock import FolderLock

Item, Result = TypeVar("Item"), TypeVar("Result")
FORMAT = 1  # changes when the layout does, so that older stores are made anew
SHARD_TOKENS = 2**28  # half a GiB of uint16
AHEAD = 2  # batches that are being tokenised while one is written


def dtype_for(vocab_size: int) -> str:
    """What ids are kept as."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class TokenStore:
    """The ids of many documents, one after the other, read as if they were one array."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.info: dict[str, Any] = json.loads((self.folder / "store.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            raise self._damaged(self.folder / "store.json") from None
        sizes = [min(SHARD_TOKENS, len(self) - first) for first in range(0, len(self), SHARD_TOKENS)]
        self._shards = [self._map(f"ids-{shard:05d}.bin", self.info["dtype"], size) for shard, size in enumerate(sizes)]
        masked = self.info["masked"]
        self._masks = [self._map(f"mask-{shard:05d}.bin", "uint8", size) for shard, size in enumerate(sizes)] if masked else []
        self.starts = self._map("starts.bin", "int64", self.documents + 1)

    def _map(self, name: str, dtype: str, count: int) -> np.ndarray:
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != count * np.dtype(dtype).itemsize:
            raise self._damaged(path)
        return np.memmap(path, dtype=dtype, mode="r")

    def _damaged(self, path: Path) -> DataError:
        return DataError(f"{path}: the tokenised data is damaged; delete {self.folder.parent}, and it is made anew")

    def __len__(self) -> int:
        """Tokens in all."""
        return self.info["tokens"]

    @property
    def documents(self) -> int:
        return self.info["documents"]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text that is learnt: what bits per byte are counted over. Of conversations, the replies."""
        return self.info["text_bytes"]

    @property
    def supervised(self) -> int:
        """Tokens that are learnt."""
        return self.info["supervised"]

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop) as int64."""
        return _gather(self._shards, start, stop).astype(np.int64)

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Whether tokens [start, stop) are supervised, as bool."""
        return _gather(self._masks, start, stop).astype(bool)

    def document_at(self, token: int) -> int:
        """The number of the document that holds a token."""
        return int(np.searchsorted(self.starts, token, side="right")) - 1


def _gather(shards: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    parts = []
    while start < stop:
        shard, within = divmod(start, SHARD_TOKENS)
        part = shards[shard][within : within + stop - start]
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.int64)


class StoreWriter:
    """Writes a token store into a folder that is not yet in its place."""

    def __init__(self, folder: Path, vocab_size: int, masked: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.masked = folder, masked
        self.dtype = dtype_for(vocab_size)
        self.tokens = self.supervised = self.documents = self.text_bytes = self.shards = 0
        self._digest = hashlib.sha256()
        self._starts = open(folder / "starts.bin", "wb")
        self._ids = self._masks = None

    def add(self, ids: Sequence[int] | np.ndarray, text_bytes: int, mask: Sequence[bool] | None = None) -> None:
        """Append one document."""
        self._starts.write(np.int64(self.tokens).tobytes())
        array = np.asarray(ids, self.dtype)
        mask_array = np.asarray(mask, dtype=np.uint8) if self.masked else None
        self._digest.update(len(array).to_bytes(8, "little") + array.tobytes())
        if mask_array is not None:
            self._digest.update(mask_array.tobytes())
        written = 0
        while written < len(array):
            room = SHARD_TOKENS - self.tokens % SHARD_TOKENS
            if room == SHARD_TOKENS:
                self._next_shard()
            self._ids.write(array[written : written + room].tobytes())
            if mask_array is not None:
                self._masks.write(mask_array[written : written + room].tobytes())
            step = min(room, len(array) - written)
            written += step
            self.tokens += step
        self.documents += 1
        self.supervised += len(array) if mask_array is None else int(mask_array.sum())
        self.text_bytes += text_bytes

    def _next_shard(self) -> None:
        for file in (self._ids, self._masks):
            if file is not None:
                file.close()
        self._ids = open(self.folder / f"ids-{self.shards:05d}.bin", "wb")
        self._masks = open(self.folder / f"mask-{self.shards:05d}.bin", "wb") if self.masked else None
        self.shards += 1

    def close(self, **extra: Any) -> None:
        """Complete the store. ``extra`` goes into store.json: what was skipped, say."""
        self._starts.write(np.int64(self.tokens).tobytes())
        for file in (self._ids, self._masks, self._starts):
            if file is not None:
                file.close()
        info = {
            "dtype": self.dtype,
            "masked": self.masked,
            "shards": self.shards,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "content_sha256": self._digest.hexdigest(),
            **extra,
        }
        # In ASCII: file names and keys that are quoted in a reason may hold what UTF-8 cannot.
        (self.folder / "store.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def prepared(
    cache: str | Path, files: Sequence[Path], tokenizer_json: str, options: dict[str, Any], build: Callable[[Path], None]
) -> tuple[Path, bool]:
    """The folder of stores that ``build(folder)`` made from these inputs, and whether it was there already.

    Known by a fingerprint of the files' names, sizes and times of change, the tokenizer and the options.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = json.dumps([FORMAT, stats, hashlib.sha256(tokenizer_json.encode()).hexdigest(), options], sort_keys=True)
    folder = Path(cache) / hashlib.sha256(identity.encode()).hexdigest()[:20]
    if folder.is_dir():
        return folder, True
    # Runs that start together, and the processes of one run, tokenise once: who comes second waits, and finds it done.
    with FolderLock(Path(cache) / ".locks" / folder.name, wait=True):
        if folder.is_dir():
            return folder, True
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # by a process that was killed: the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        with whole_folder(folder) as temporary:
            build(temporary)
    return folder, False


def goes_to_validation(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is held out. It depends on the text itself, so copies of it never stand on both sides."""
    digest = hashlib.blake2b(f"{seed}\n{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def worked_ahead(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    """Each item with what ``work`` makes of it, in order. Threads work on the next ones meanwhile, so that reading, tokenising (which
    takes all cores, and does not hold Python's lock) and writing go on at the same time.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(AHEAD, "tokenising") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > AHEAD:
                    item, result = waiting.popleft()
                    yield item, result.result()
            while waiting:
                item, result = waiting.popleft()
                yield item, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


def require_documents(store: TokenStore, files: Sequence[Path], what: str) -> None:
    if store.documents == 0:
        names = ", ".join(str(file) for file in files[:3])
        raise DataError(f"{names}: no usable {what}; check the file, or name another with --data")


def report(train: TokenStore, val: TokenStore, reused: bool, what: str) -> None:
    """Print what there is to learn from, and what was left out."""
    origin = "found tokenised" if reused else "tokenised"
    print(
        f"data      {origin}: {train.documents:,} {what}, {len(train):,} tokens "
        f"({train.text_bytes / max(1, train.supervised):.2f} bytes per learnt token); "
        f"validation {val.documents:,} {what}, {len(val):,} tokens"
    )
    if rejected := train.info.get("rejected"):
        print(f"data      skipped {len(rejected)} bad records, the first: {rejected[0]}")
