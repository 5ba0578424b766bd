"""Pretraining data: documents, each followed by the document-end token, cut into blocks of equal length.

The stream is cut as it comes, so nothing is lost but padding in the last block: block i reads tokens [iT, (i+1)T) and
predicts the tokens one further.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from etude.corpus.inputs import find_files
from etude.corpus.jsonl import Rejects, read_texts
from etude.data import encoding, tokens
from etude.data.tokens import StoreWriter, TokenStore
from etude.losses import IGNORED
from etude.runlog import progress_bar
from etude.tokenizer import Tokenizer


class PretrainBlocks:
    """A token store seen as blocks of ``block_size`` tokens."""

    def __init__(self, store: TokenStore, block_size: int, pad_id: int, separate_documents: bool = False):
        self.store, self.block_size, self.pad_id = store, block_size, pad_id
        self.separate_documents = separate_documents
        self.most_documents = self._most_documents() if separate_documents else 0  # that any block has a part of

    def __len__(self) -> int:
        return max(0, -(-(len(self.store) - 1) // self.block_size))

    def load(self, blocks: Sequence[int]) -> dict[str, np.ndarray]:
        """``ids`` and ``labels``, (blocks, block_size) int64; with ``separate_documents`` also ``positions`` and
        ``documents``, so that attention stops where a document ends, and ``ends``, (blocks, most_documents), where that is.
        """
        T = self.block_size
        batch = {
            "ids": np.full((len(blocks), T), self.pad_id, dtype=np.int64),
            "labels": np.full((len(blocks), T), IGNORED, dtype=np.int64),
        }
        for row, block in enumerate(blocks):
            window = self.store.ids(block * T, min((block + 1) * T + 1, len(self.store)))
            batch["ids"][row, : len(window) - 1] = window[:-1]
            batch["labels"][row, : len(window) - 1] = window[1:]
        if self.separate_documents:
            batch |= self._boundaries(blocks)
        return batch

    def _boundaries(self, blocks: Sequence[int]) -> dict[str, np.ndarray]:
        T = self.block_size
        documents = np.zeros((len(blocks), T), dtype=np.int64)
        ends = np.full((len(blocks), self.most_documents), T, dtype=np.int64)
        for row, block in enumerate(blocks):
            first, last = self.store.document_at(block * T), self.store.document_at((block + 1) * T - 1)
            inner = np.asarray(self.store.starts[first + 1 : last + 1]) - block * T
            inner = inner[inner < T]  # where another document begins
            documents[row, inner] = 1
            ends[row, : len(inner)] = inner
        documents = documents.cumsum(axis=1)
        index = np.arange(T)
        begins = np.diff(documents, axis=1, prepend=-1) > 0
        positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
        return {"documents": documents, "positions": positions, "ends": ends}

    def _most_documents(self) -> int:
        counts = np.ones(len(self) + 1, dtype=np.int32)  # the last block may end where the text does
        inner = self.store.starts[1:-1]
        for at in range(0, len(inner), 2**20):  # so that memory stays flat
            blocks = np.asarray(inner[at : at + 2**20]) // self.block_size
            begun = np.bincount(blocks - blocks[0])
            counts[blocks[0] : blocks[0] + len(begun)] += begun
        return int(counts.max())

    def documents(self, block: int) -> list[int]:
        """The documents that a block is made of."""
        first = self.store.document_at(block * self.block_size)
        last = self.store.document_at(min((block + 1) * self.block_size, len(self.store) - 1))
        return list(range(first, last + 1))

    def describe(self, block: int) -> str:
        """Which documents a block is made of, for error messages."""
        documents = self.documents(block)
        return f"block {block} (documents {documents[0]}–{documents[-1]})"


def prepare_pretrain(
    data: Sequence[str],
    tokenizer: Tokenizer,
    cache: str | Path,
    val_data: Sequence[str] = (),
    val_fraction: float = 0.01,
    seed: int = 0,
    text_key: str = "text",
    text_unit: str = "line",
    max_bad: int = 0,
    workers: int = 1,
) -> tuple[TokenStore, TokenStore]:
    """Tokenise ``data`` (or find it tokenised) into a training and a validation store.

    ``workers`` processes do it, or as many as pay with 0; a script that asks for more than 1 must not do its work when it is imported.
    """
    files, val_files = find_files(data), find_files(val_data)
    fraction = 0.0 if val_files else val_fraction
    options = {"kind": "pretrain", "fraction": fraction, "seed": seed, "text_key": text_key, "text_unit": text_unit}
    options |= {"train_files": len(files), "max_bad": max_bad}

    def build(folder: Path) -> None:
        train, val = (StoreWriter(folder / part, len(tokenizer), masked=False) for part in ("train", "val"))
        rejects = Rejects(max_bad)
        for sources, is_validation in ((files, False), (val_files, True)):
            size = encoding.text_size(sources)
            with progress_bar("tokenising" if not is_validation else "tokenising validation data", size, "B") as bar:
                texts = read_texts(sources, rejects, text_key, text_unit)
                processes = encoding.workers_for(size, workers)
                with closing(encoding.documents(texts, tokenizer, fraction, seed, processes)) as documents:
                    for document in documents:
                        (val if is_validation or document.held_out else train).add(document.ids, document.text_bytes)
                        bar.update(document.text_bytes)
        train.close(rejected=rejects.reasons)
        val.close()

    folder, reused = tokens.prepared(cache, [*files, *val_files], tokenizer.json, options, build)
    train, val = TokenStore(folder / "train"), TokenStore(folder / "val")
    tokens.require_documents(train, files, "text")
    tokens.report(train, val, reused, "documents")
    return train, val
