"""Texts to token ids, in order, on all cores: by threads of this process, or by processes of their own.

The tokenizers library finds tokens without holding Python's lock, half a microsecond each; but they become Python's integers under it,
which takes a tenth of that. Beside two cores that is little; beside sixteen it is what everything waits for. Processes have a lock each.
"""

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from etude.corpus.streams import COMPRESSED_SUFFIXES
from etude.corpus.workers import cores, in_order
from etude.data import tokens
from etude.errors import MismatchError
from etude.tokenizer import Tokenizer

WORTH_PROCESSES = 100_000_000  # bytes of text: what takes longer than processes take to start
COMPRESSION = 4  # bytes of text for one of a compressed file, about
FEW_CORES = 4  # with less, threads are as fast
MOST_WORKERS = 32  # of some 100 MiB each; reading is the bottleneck then
BATCH_CHARACTERS = 2_000_000  # what is tokenised at once by threads, on all cores: little in memory
WORKER_CHARACTERS = 500_000  # and by a process, on one


class Document(NamedTuple):
    ids: np.ndarray  # (tokens,), the document-end token among them
    text_bytes: int
    held_out: bool  # for validation


def text_size(files: Sequence[Path]) -> int:
    """About how many bytes of text there are in them."""
    return sum(file.stat().st_size * (COMPRESSION if file.suffix in COMPRESSED_SUFFIXES else 1) for file in files)


def workers_for(size: int, workers: int = 0) -> int:
    """How many processes shall tokenise ``size`` bytes of text: ``workers``, or with 0 what pays; 1 means threads of this one."""
    if workers:
        return workers
    return min(cores(), MOST_WORKERS) if size >= WORTH_PROCESSES and cores() >= FEW_CORES else 1


def documents(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, fraction: float, seed: int, workers: int = 1
) -> Generator[Document, None, None]:
    """The documents of (place, text) pairs. ``fraction`` of them, by :func:`tokens.goes_to_validation`, are held out."""
    here = partial(_encode, tokenizer, fraction, seed)
    if workers == 1:
        encoded = (found for _, found in tokens.worked_ahead(_batches(texts, BATCH_CHARACTERS), here))
    else:
        elsewhere = partial(_encode_elsewhere, tokenizer.folder.resolve(), tokenizer.fingerprint, fraction, seed)
        encoded = in_order(elsewhere, _batches(texts, WORKER_CHARACTERS), workers, meanwhile=here)
    for batch in encoded:
        yield from batch


def _batches(texts: Iterable[tuple[str, str]], characters: int) -> Iterator[list[str]]:
    batch, size = [], 0
    for _, text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, fraction: float, seed: int, texts: list[str]) -> list[Document]:
    found, dtype = [], tokens.dtype_for(len(tokenizer))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        ids.append(tokenizer.document_end_id)
        held_out = fraction > 0 and tokens.goes_to_validation(text, fraction, seed)
        found.append(Document(np.array(ids, dtype), len(text.encode("utf-8")), held_out))
    return found


def _encode_elsewhere(folder: Path, fingerprint: str, fraction: float, seed: int, texts: list[str]) -> list[Document]:
    return _encode(_opened(folder, fingerprint), fraction, seed, texts)


@lru_cache(1)
def _opened(folder: Path, fingerprint: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    tokenizer = Tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise MismatchError(f"{folder}: the tokenizer has changed while it was at work; start again")
    return tokenizer
