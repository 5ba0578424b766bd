"""SFT data: conversations, tokenised once, packed into rows in which none of them sees another.

A conversation of n tokens fills n - 1 places of a row: each token predicts the next of its own conversation. One that is
longer than a row is cut after the last whole reply that fits; where not even the first fits, it is cut inside the reply,
and no end token is learnt.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from etude.chat import ChatFormat, EncodedChat
from etude.corpus.conversations import check_order, to_messages
from etude.corpus.inputs import find_files
from etude.corpus.jsonl import Rejects, read_records, unencodable
from etude.data import tokens
from etude.data.tokens import StoreWriter, TokenStore
from etude.errors import DataError
from etude.losses import IGNORED
from etude.runlog import progress_bar
from etude.tokenizer import Tokenizer

BATCH_CONVERSATIONS = 1024
VERIFIED_CONVERSATIONS = 200  # how many are compared with the template's own rendering


class SFTRows:
    """A token store of conversations seen as packed rows of ``block_size`` tokens."""

    def __init__(self, store: TokenStore, block_size: int, pad_id: int):
        self.store, self.block_size, self.pad_id = store, block_size, pad_id
        places = np.diff(np.asarray(store.starts)) - 1
        self.rows = pack(places, block_size)
        self.most_documents = max(map(len, self.rows), default=0) + 1  # padding counts as one

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """``ids``, ``labels``, ``positions`` and ``documents``, each (rows, block_size) int64, and ``ends``, (rows, K): where
        each document of a row ends.
        """
        shape = (len(rows), self.block_size)
        batch = {
            "ids": np.full(shape, self.pad_id, dtype=np.int64),
            "labels": np.full(shape, IGNORED, dtype=np.int64),
            "positions": np.zeros(shape, dtype=np.int64),
            "documents": np.full(shape, -1, dtype=np.int64),  # padding: a document of its own
            "ends": np.full((len(rows), self.most_documents), self.block_size, dtype=np.int64),
        }
        for row, number in enumerate(rows):
            at = 0
            for nth, document in enumerate(self.rows[number]):
                start, stop = int(self.store.starts[document]), int(self.store.starts[document + 1])
                ids, learnt = self.store.ids(start, stop), self.store.mask(start, stop)
                end = at + len(ids) - 1
                batch["ids"][row, at:end] = ids[:-1]
                batch["labels"][row, at:end] = np.where(learnt[1:], ids[1:], IGNORED)
                batch["positions"][row, at:end] = np.arange(end - at)
                batch["documents"][row, at:end] = document
                batch["ends"][row, nth] = end
                at = end
        return batch

    def documents(self, row: int) -> list[int]:
        """The conversations that a row is made of."""
        return list(self.rows[row])

    def describe(self, row: int) -> str:
        """Which conversations a row is made of, for error messages."""
        return f"row {row} (conversations {', '.join(map(str, self.rows[row]))})"

    @property
    def filled(self) -> float:
        """The share of places that hold a token rather than padding."""
        return (len(self.store) - self.store.documents) / max(1, len(self) * self.block_size)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows as best fit manages: longest first, each into the fullest row that has room.

    Best-fit decreasing (D. S. Johnson, 1973) needs at most 11/9 of the fewest possible rows; rows are found by their
    remaining room, in the bits of one integer. Returns the item numbers of each row.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows that have just this much room left
    rooms = 0  # bit r is set where by_room[r] holds a row
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1  # the lowest set bit: the least room that suffices
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def cut(chat: EncodedChat, limit: int) -> tuple[EncodedChat, str]:
    """At most ``limit`` tokens of a conversation, ending with its last learnt token, and how it was cut:
    "", "after a reply" or "inside a reply".
    """
    last = chat.ends[-1] if chat.ends else len(chat.ids)
    if last <= limit:
        end, how = last, ""  # what the template writes after the last reply teaches nothing
    else:
        fitting = [end for end in chat.ends if end <= limit]
        end, how = (fitting[-1], "after a reply") if fitting else (limit, "inside a reply")
    return EncodedChat(chat.ids[:end], chat.mask[:end], [e for e in chat.ends if e <= end]), how


def prepare_sft(
    data: Sequence[str],
    tokenizer: Tokenizer,
    cache: str | Path,
    block_size: int,
    val_data: Sequence[str] = (),
    val_fraction: float = 0.01,
    seed: int = 0,
    max_bad: int = 0,
) -> tuple[TokenStore, TokenStore]:
    """Tokenise conversations (or find them tokenised) into a training and a validation store."""
    files, val_files = find_files(data), find_files(val_data)
    fraction = 0.0 if val_files else val_fraction
    options = {"kind": "sft", "fraction": fraction, "seed": seed, "block_size": block_size, "max_bad": max_bad}
    options |= {"train_files": len(files), "template": tokenizer.settings.get("chat_template")}

    def build(folder: Path) -> None:
        format = ChatFormat(tokenizer)
        writers = {part: StoreWriter(folder / part, len(tokenizer), masked=True) for part in ("train", "val")}
        rejects, cuts = Rejects(max_bad), {"after a reply": 0, "inside a reply": 0}
        unverified = VERIFIED_CONVERSATIONS
        too_long: list[str] = []  # where the first question alone fills a row: nothing to learn is left

        def add(place: str, text: str, chat: EncodedChat, is_validation: bool) -> None:
            chat, how = cut(chat, block_size + 1)
            if not any(chat.mask):
                too_long.append(place)
                return
            if how:
                cuts[how] += 1
            to_val = is_validation or (fraction > 0 and tokens.goes_to_validation(text, fraction, seed))
            learnt_bytes = sum(tokenizer.byte_lengths[i] for i, learnt in zip(chat.ids, chat.mask, strict=True) if learnt)
            writers["val" if to_val else "train"].add(chat.ids, learnt_bytes, chat.mask)

        def verified(batches):
            """The batches, the first conversations of which are held against the template, before any is encoded."""
            nonlocal unverified
            for places, batch in batches:
                for place, messages in zip(places[:unverified], batch, strict=False):
                    _verify(format, messages, place)
                unverified -= min(unverified, len(batch))
                yield places, batch

        for sources, is_validation in ((files, False), (val_files, True)):
            size = sum(file.stat().st_size for file in sources)
            with progress_bar("tokenising validation data" if is_validation else "tokenising", size, "B") as bar:
                batches = verified(_conversation_batches(sources, rejects))
                for (places, batch), encoded in tokens.worked_ahead(batches, lambda pair: format.encode_batch(pair[1])):
                    for place, messages, chat in zip(places, batch, encoded, strict=True):
                        text = "\n".join(message["content"] for message in messages)
                        bar.update(len(text.encode("utf-8")))
                        add(place, text, chat, is_validation)
        writers["train"].close(rejected=rejects.reasons, cuts=cuts, too_long=too_long)
        writers["val"].close()

    folder, reused = tokens.prepared(cache, [*files, *val_files], tokenizer.json, options, build)
    train, val = TokenStore(folder / "train"), TokenStore(folder / "val")
    tokens.require_documents(train, files, "conversation")
    tokens.report(train, val, reused, "conversations")
    for how, count in train.info["cuts"].items():
        if count:
            print(f"data      {count:,} conversations are longer than block_size ({block_size}) and were cut {how}")
    if too_long := train.info["too_long"]:
        print(
            f"data      {len(too_long):,} conversations were left out, their first question alone filling block_size "
            f"({block_size}): {', '.join(too_long[:3])}{' …' if len(too_long) > 3 else ''}"
        )
    return train, val


def read_conversation(record: dict) -> list[dict[str, str]]:
    """The checked messages of a training record. Raises :class:`DataError` with the reason."""
    messages = to_messages(record)
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        messages = messages[:-1]  # a question without its answer teaches nothing; what came before it does
    for number, message in enumerate(messages, 1):
        if problem := unencodable(message["content"]):
            raise DataError(f"turn {number} {problem}")
    return messages


def _verify(format: ChatFormat, messages: list[dict[str, str]], place: str) -> None:
    try:
        format.verify(messages)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _conversation_batches(files: Sequence[Path], rejects: Rejects):
    places, batch = [], []
    for path in files:
        for place, record in read_records(path, rejects):
            try:
                batch.append(read_conversation(record))
                places.append(place)
            except DataError as error:
                rejects.add(place, str(error))
                continue
            if len(batch) == BATCH_CONVERSATIONS:
                yield places, batch
                places, batch = [], []
    if batch:
        yield places, batch
