"""From documents to batches: every token learnt once an epoch, from its own document only, in an order that is a function."""

import dataclasses
import json
import math
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS, write_jsonl

from etude.chat import ChatFormat, EncodedChat
from etude.corpus import workers
from etude.corpus.workers import in_order
from etude.data import encoding, sft, tokens
from etude.data.batches import Batches, as_tensors, micro_batches, shuffled
from etude.data.pretrain import PretrainBlocks, prepare_pretrain
from etude.data.sft import SFTRows, cut, pack, prepare_sft, read_conversation
from etude.data.tokens import StoreWriter, TokenStore
from etude.errors import DataError, MismatchError
from etude.losses import IGNORED, causal_lm_loss
from etude.model.transformer import Etude
from etude.tokenizer import Tokenizer, train_tokenizer

PAD, ROW = 0, 160


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def double_model(tiny_config):
    torch.manual_seed(0)
    return Etude(dataclasses.replace(tiny_config, max_position_embeddings=ROW)).double()


def store_of(folder, documents: list[list[int]], masks: list[list[bool]] | None = None, vocab_size: int = 320) -> TokenStore:
    writer = StoreWriter(folder, vocab_size, masked=masks is not None)
    for number, ids in enumerate(documents):
        writer.add(ids, text_bytes=len(ids) * 2, mask=masks[number] if masks else None)
    writer.close()
    return TokenStore(folder)


def random_documents(seed: int, count: int, longest: int = 12) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(8, 300) for _ in range(source.randrange(1, longest))] for _ in range(count)]


# --- token stores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 7, 50, 2**28])
@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_what_was_written_is_read_across_shards(tmp_path, monkeypatch, shard_tokens, vocab_size, dtype):
    monkeypatch.setattr(tokens, "SHARD_TOKENS", shard_tokens)
    documents = [*random_documents(0, 30), [vocab_size - 1] * 100, [0]]
    source = random.Random(1)
    masks = [[source.random() < 0.5 for _ in ids] for ids in documents]
    store = store_of(tmp_path, documents, masks, vocab_size)
    stream, mask = list(chain(*documents)), list(chain(*masks))
    assert (len(store), store.documents, store.supervised, store.text_bytes) == (len(stream), 32, sum(mask), 2 * len(stream))
    assert store.info["dtype"] == dtype and store.info["shards"] == math.ceil(len(stream) / shard_tokens)
    ranges = [(0, len(stream)), (0, 0), (5, 5), (len(stream) - 1, len(stream))]
    ranges += [sorted(source.randrange(len(stream) + 1) for _ in range(2)) for _ in range(50)]
    for start, stop in ranges:
        assert store.ids(start, stop).tolist() == stream[start:stop]
        assert store.mask(start, stop).tolist() == mask[start:stop]
        assert store.ids(start, stop).dtype == np.int64 and store.mask(start, stop).dtype == bool
    owner = [number for number, ids in enumerate(documents) for _ in ids]
    assert [store.document_at(token) for token in range(len(stream))] == owner
    assert store.starts.tolist() == np.cumsum([0, *map(len, documents)]).tolist()


def test_an_empty_store_is_a_store(tmp_path):
    store = store_of(tmp_path, [])
    assert (len(store), store.documents, store.ids(0, 0).tolist(), store.starts.tolist()) == (0, 0, [], [0])


def test_reasons_that_utf_8_cannot_hold_are_kept(tmp_path):
    writer = StoreWriter(tmp_path, 320, masked=False)
    writer.close(rejected=["caf\udce9.jsonl:3: a file name from another time", "春"])
    assert TokenStore(tmp_path).info["rejected"] == ["caf\udce9.jsonl:3: a file name from another time", "春"]


def test_the_content_hash_tells_any_difference(tmp_path):
    documents = [[1, 2, 3], [4, 5]]
    masks = [[True, False, True], [False, True]]
    variants = [
        (documents, None),
        ([[1, 2, 3, 4, 5]], None),  # the same stream with another boundary
        ([[1, 2], [3, 4, 5]], None),
        (documents[::-1], None),
        ([[1, 2, 3], [4, 6]], None),
        (documents, masks),
        (documents, [[True, True, True], [False, True]]),
    ]
    hashes = {store_of(tmp_path / str(number), *variant).info["content_sha256"] for number, variant in enumerate(variants)}
    assert len(hashes) == len(variants)
    assert store_of(tmp_path / "again", documents, masks).info["content_sha256"] in hashes


@pytest.mark.parametrize("name", ["ids-00000.bin", "mask-00000.bin", "starts.bin"])
@pytest.mark.parametrize("keep", [0, 1, -1, None], ids=["emptied", "one byte", "a byte short", "missing"])
def test_a_damaged_store_is_refused(tmp_path, name, keep):
    store_of(tmp_path, random_documents(0, 9), [[True] * len(ids) for ids in random_documents(0, 9)])
    if keep is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"{name}: the tokenised data is damaged; delete .*, and it is made anew"):
        TokenStore(tmp_path)


# --- preparing pretraining data --------------------------------------------------------------------------------------


def prepared(text_file, tokenizer, tmp_path, **options) -> tuple[TokenStore, TokenStore]:
    return prepare_pretrain([str(text_file)], tokenizer, tmp_path / "cache", **options)


def texts_in(store: TokenStore, tokenizer) -> list[str]:
    """The documents of a store, their end tokens taken off."""
    texts = []
    for start, stop in zip(store.starts[:-1], store.starts[1:], strict=True):
        ids = store.ids(int(start), int(stop)).tolist()
        assert ids[-1] == tokenizer.document_end_id and tokenizer.document_end_id not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


def test_documents_are_stored_each_with_its_end(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)
    texts = [*TEXTS, "<|endoftext|> and <|im_end|> typed by somebody", " spaces \n", "e\u0301"]
    path = write_jsonl(tmp_path / "a.jsonl", ({"text": text} for text in texts))
    train, val = prepared(path, tokenizer, tmp_path, val_fraction=0)
    assert texts_in(train, tokenizer) == texts
    assert val.documents == 0 and len(val) == 0
    assert train.text_bytes == sum(len(text.encode("utf-8")) for text in texts)
    assert train.supervised == len(train) == sum(len(tokenizer.encode(text)) + 1 for text in texts)


def test_processes_write_the_store_that_threads_write(tmp_path, tokenizer, text_file, monkeypatch):
    monkeypatch.setattr(encoding, "WORKER_CHARACTERS", 500)
    # Not in this process while they start, or they would find nothing left to do.
    monkeypatch.setattr(encoding, "in_order", lambda function, items, workers, meanwhile: in_order(function, items, workers))
    threads = [store.info for store in prepared(text_file, tokenizer, tmp_path / "threads", val_fraction=0.3)]
    processes = [store.info for store in prepared(text_file, tokenizer, tmp_path / "processes", val_fraction=0.3, workers=2)]
    assert threads == processes and all(info["documents"] > 20 for info in threads)


def test_until_processes_have_started_this_one_works(tmp_path, tokenizer, text_file):
    """So little text is done by then."""
    threads = [store.info for store in prepared(text_file, tokenizer, tmp_path / "threads")]
    assert threads == [store.info for store in prepared(text_file, tokenizer, tmp_path / "processes", workers=2)]

    def slowly():
        for number in range(150):
            time.sleep(0.02)
            yield number

    here = []
    assert list(in_order(operator.neg, slowly(), 2, meanwhile=lambda x: (here.append(x), -x)[1])) == [-x for x in range(150)]
    assert here == list(range(len(here))) and 0 < len(here) < 150


def test_ctrl_c_while_a_pool_ends_is_answered_afterwards(monkeypatch):
    ended = []
    whole = workers.ProcessPoolExecutor.shutdown

    def shutdown(pool, **options):
        os.kill(os.getpid(), signal.SIGINT)
        whole(pool, **options)
        ended.append(True)

    monkeypatch.setattr(workers.ProcessPoolExecutor, "shutdown", shutdown)
    with pytest.raises(KeyboardInterrupt):
        list(in_order(operator.neg, range(3), 2))
    assert ended and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_processes_answer_for_the_tokenizer_that_was_asked_for(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(encoding, "in_order", lambda function, items, workers, meanwhile: in_order(function, items, workers))
    tokenizer = train_tokenizer(TEXTS * 3, tmp_path / "tokenizer", 300)
    train_tokenizer(TEXTS * 3, tmp_path / "other", 310)
    shutil.copy(tmp_path / "other/tokenizer.json", tmp_path / "tokenizer/tokenizer.json")
    with pytest.raises(MismatchError, match="tokenizer has changed while it was at work"):
        prepared(text_file, tokenizer, tmp_path, workers=2)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]


@pytest.mark.parametrize("size, asked, cores, found", [
    (10**6, 0, 16, 1), (10**8, 0, 16, 16), (10**8, 0, 2, 1), (10**9, 0, 200, 32), (10**9, 1, 16, 1), (1, 3, 2, 3),
])  # fmt: skip
def test_processes_tokenise_where_they_pay(size, asked, cores, found, monkeypatch):
    monkeypatch.setattr(encoding, "cores", lambda: cores)
    assert encoding.workers_for(size, asked) == found


def test_compressed_files_count_for_their_text(tmp_path):
    for name in ("a.jsonl", "b.jsonl.xz", "c.txt.zst"):
        (tmp_path / name).write_bytes(bytes(100))
    assert encoding.text_size(sorted(tmp_path.iterdir())) == 100 + 2 * 100 * encoding.COMPRESSION


def test_what_processes_import_is_light():
    heavy = "import etude.data.encoding, sys; print({'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_tokenising_is_done_once_and_again_when_anything_changes(tmp_path, tokenizer, text_file, capsys):
    def folder(tokenizer=tokenizer, **options) -> str:
        return str(prepared(text_file, tokenizer, tmp_path, **options)[0].folder)

    first = folder()
    assert ": 12" not in capsys.readouterr().out.split("tokenised")[0] and folder() == first
    assert "found tokenised" in capsys.readouterr().out
    changed = {
        "val_fraction": folder(val_fraction=0.5),
        "seed": folder(seed=1),
        "text_unit": folder(text_unit="file"),
        "max_bad": folder(max_bad=1),
        "val_data": folder(val_data=[str(write_jsonl(tmp_path / "val.jsonl", [{"text": "validation"}]))]),
        "tokenizer": folder(tokenizer=train_tokenizer(TEXTS * 3, tmp_path / "other", 319)),
    }
    assert "found" not in capsys.readouterr().out
    assert len({first, *changed.values()}) == len(changed) + 1
    assert folder(tokenizer=Tokenizer(tmp_path / "other")) == changed["tokenizer"]  # by content, wherever it lies
    status = os.stat(text_file)
    os.utime(text_file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = folder()
    text_file.write_text(text_file.read_text(encoding="utf-8") + '{"text": "one more"}\n', encoding="utf-8")
    os.utime(text_file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len({first, touched, folder()}) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError, OSError])
def test_an_interrupted_build_leaves_nothing(tmp_path, tokenizer, text_file, monkeypatch, error):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 500)
    whole, calls = tokenizer.encode_batch, []

    def failing(texts):
        calls.append(texts)
        if len(calls) == 4:
            raise error("stop")
        return whole(texts)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(tokenizer, "encode_batch", failing)
        prepared(text_file, tokenizer, tmp_path)
    assert len(calls) >= 4 and [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]
    train, val = prepared(text_file, tokenizer, tmp_path)
    assert train.documents + val.documents == 120


def test_bad_records_end_it_or_are_kept_on_record(tmp_path, tokenizer, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"body": 1}\n{"text": "good too"}\n{"\\ud800": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a.jsonl:2: no key 'text'"):
        prepared(path, tokenizer, tmp_path, val_fraction=0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]
    for _ in range(2):  # told again when the data is found tokenised
        train, _ = prepared(path, tokenizer, tmp_path, val_fraction=0, max_bad=2)
        assert texts_in(train, tokenizer) == ["good", "good too"]
        assert [reason.split(": ")[0] for reason in train.info["rejected"]] == [f"{path}:2", f"{path}:4"]
        assert "skipped 2 bad records" in capsys.readouterr().out


def test_data_without_a_document_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"a.jsonl: no usable text; check the file, or name another with --data"):
        prepared(write_jsonl(tmp_path / "a.jsonl", []), tokenizer, tmp_path)
    with pytest.raises(DataError, match="no usable conversation"):
        prepare_sft([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "cache", 32)


def test_copies_of_a_document_stand_on_one_side(tmp_path, tokenizer):
    texts = [f"text number {number % 50}" for number in range(400)]
    random.Random(0).shuffle(texts)
    path = write_jsonl(tmp_path / "a.jsonl", ({"text": text} for text in texts))
    train, val = prepared(path, tokenizer, tmp_path, val_fraction=0.3)
    train_texts, val_texts = texts_in(train, tokenizer), texts_in(val, tokenizer)
    assert val_texts and not set(train_texts) & set(val_texts)
    assert sorted(train_texts + val_texts) == sorted(texts)


def test_the_validation_share_is_that_asked_for(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ({"text": f"number {number}"} for number in range(3000)))
    sides = {}
    for seed in (0, 1):
        for fraction in (0.1, 0.01):
            train, val = prepared(path, tokenizer, tmp_path, val_fraction=fraction, seed=seed)
            assert train.documents + val.documents == 3000
            assert abs(val.documents - 3000 * fraction) < 4 * math.sqrt(3000 * fraction)
            sides[seed, fraction] = set(texts_in(val, tokenizer))
    assert sides[0, 0.01] < sides[0, 0.1] and sides[0, 0.1] != sides[1, 0.1]


def test_validation_data_of_its_own_leaves_the_training_data_whole(tmp_path, tokenizer, text_file):
    other = write_jsonl(tmp_path / "val.jsonl", [{"text": "held out"}, {"text": "as well"}])
    train, val = prepared(text_file, tokenizer, tmp_path, val_data=[str(other)], val_fraction=0.5)
    assert train.documents == 120 and texts_in(val, tokenizer) == ["held out", "as well"]


# --- pretraining blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 5, 16, 61, 1000])
@pytest.mark.parametrize("separate", [False, True])
def test_every_token_but_the_first_is_predicted_once(tmp_path, monkeypatch, block_size, separate):
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 13)
    for extra in range(3):  # ends of the stream inside a block, at its edge, one beyond
        documents = [*random_documents(2, 9), [9] * (extra + 1)]
        stream = list(chain(*documents))
        blocks = PretrainBlocks(store_of(tmp_path / str(extra), documents), block_size, PAD, separate)
        batch = blocks.load(range(len(blocks)))
        ids, labels = batch["ids"].flatten(), batch["labels"].flatten()
        real = len(stream) - 1
        assert len(blocks) == math.ceil(real / block_size) and batch["ids"].shape == (len(blocks), block_size)
        assert ids[:real].tolist() == stream[:-1] and labels[:real].tolist() == stream[1:]  # a label is the next token
        assert (ids[real:] == PAD).all() and (labels[real:] == IGNORED).all()
        order = random.Random(0).sample(range(len(blocks)), len(blocks))
        for name, values in blocks.load(order).items():
            assert (values == batch[name][order]).all()


def test_too_little_for_a_block_is_no_block(tmp_path):
    assert len(PretrainBlocks(store_of(tmp_path / "0", []), 4, PAD)) == 0
    assert len(PretrainBlocks(store_of(tmp_path / "1", [[5]]), 4, PAD)) == 0
    assert len(PretrainBlocks(store_of(tmp_path / "2", [[5], [6]]), 4, PAD)) == 1


@pytest.mark.parametrize("block_size", [1, 3, 8, 50])
def test_separate_documents_are_told_apart(tmp_path, block_size):
    documents = [*random_documents(3, 25), [7] * 40, *([8] * length for length in (1, 1, 3, 8, 16))]
    owner = [number for number, ids in enumerate(documents) for _ in ids]
    place = [at for ids in documents for at in range(len(ids))]
    blocks = PretrainBlocks(store_of(tmp_path, documents), block_size, PAD, separate_documents=True)
    for block in range(len(blocks)):
        batch = blocks.load([block])
        first = block * block_size
        inside = [first + at for at in range(block_size) if first + at < len(owner) - 1]
        numbers, positions = batch["documents"][0], batch["positions"][0]
        for i, a in enumerate(inside):
            assert positions[i] == min(place[a], i)  # it restarts at a document's beginning, and at the block's
            assert [numbers[i] == numbers[j] for j in range(len(inside))] == [owner[a] == owner[b] for b in inside]
    every = blocks.load(range(len(blocks)))
    assert_ends_say_the_same(every)
    assert every["ends"].shape[1] <= block_size + 1
    whole = blocks.load([2, 0, 1])
    for name in ("documents", "positions", "ends"):
        assert (whole[name] == np.concatenate([blocks.load([number])[name] for number in (2, 0, 1)])).all()


def assert_ends_say_the_same(batch: dict[str, np.ndarray]) -> None:
    """``ends`` divide a row where ``documents`` do."""
    length = batch["ids"].shape[1]
    by_ends = (np.arange(length)[None, :, None] >= batch["ends"][:, None, :]).sum(-1)  # how many have ended before
    documents = batch["documents"]
    assert ((by_ends[:, 1:] == by_ends[:, :-1]) == (documents[:, 1:] == documents[:, :-1])).all()
    assert (np.diff(batch["ends"]) >= 0).all() and batch["ends"].max() == length


def nats(model, ids: list[int], labels: list[int]) -> torch.Tensor:
    """The summed loss of one sequence alone, by the plainest means."""
    return F.cross_entropy(model(torch.tensor([ids]))[0], torch.tensor(labels), ignore_index=IGNORED, reduction="sum")


def test_the_loss_of_separate_documents_is_that_of_each_alone(tmp_path, double_model):
    documents = [ids * 2 for ids in random_documents(4, 14)]
    stream = list(chain(*documents))
    for separate in (True, False):
        blocks = PretrainBlocks(store_of(tmp_path / str(separate), documents), 16, PAD, separate)
        loss = causal_lm_loss(double_model, as_tensors(blocks.load(range(len(blocks)))))
        edges = set(range(0, len(stream), 16)) | ({*np.cumsum([len(ids) for ids in documents]).tolist()} if separate else set())
        edges = [*sorted(edge for edge in edges if edge < len(stream) - 1), len(stream) - 1]
        alone = sum(nats(double_model, stream[a:b], stream[a + 1 : b + 1]) for a, b in pairwise(edges))
        assert int(loss.weight) == len(stream) - 1
        torch.testing.assert_close(loss.sum, alone, rtol=1e-10, atol=0)


# --- batches ---------------------------------------------------------------------------------------------------------


class Numbered:
    """Samples that say which they are."""

    block_size = 2

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, numbers) -> dict[str, np.ndarray]:
        return {"ids": np.array([[number, -number] for number in numbers])}

    def describe(self, number: int) -> str:
        return str(number)


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    """Were it not, runs could not be resumed; change these numbers only with a reason that outweighs that."""
    assert [shuffled(index, 12, 0, 0) for index in range(12)] == [2, 5, 8, 11, 4, 9, 10, 3, 6, 1, 0, 7]
    assert [shuffled(index, 12, 0, 1) for index in range(12)] == [6, 7, 2, 8, 5, 10, 4, 0, 11, 1, 9, 3]
    assert [shuffled(index, 12, 1, 0) for index in range(12)] == [1, 11, 3, 2, 6, 9, 4, 0, 10, 5, 8, 7]
    assert shuffled(123_456_789, 10**12, 7, 3) == 442_152_529_574


def test_shuffling_is_a_bijection():
    for count in [*range(1, 70), 127, 128, 129, 1000, 1024, 1025]:
        assert sorted(shuffled(index, count, count, 1) for index in range(count)) == list(range(count))


def test_shuffling_mixes():
    tally = np.zeros((5, 5))
    for epoch in range(1000):
        for index in range(5):
            tally[index, shuffled(index, 5, 0, epoch)] += 1
    assert (abs(tally - 200) < 75).all()  # more than five standard deviations
    order = [shuffled(index, 3000, 0, 0) for index in range(3000)]
    assert abs(np.corrcoef(order, range(3000))[0, 1]) < 0.07
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.07
    assert sum(b - a in (1, -1) for a, b in pairwise(order)) < 15


@pytest.mark.parametrize("count, batch_size", [(1, 1), (1, 4), (7, 3), (12, 4), (10, 7), (5, 16), (100, 1)])
def test_every_sample_comes_once_an_epoch(count, batch_size):
    batches = Batches(Numbered(count), batch_size, seed=3)
    assert batches.steps_per_epoch == count / batch_size
    epochs = 5
    stream = [number for step in range(math.ceil(epochs * count / batch_size)) for number in batches.numbers(step)]
    orders = [stream[epoch * count : (epoch + 1) * count] for epoch in range(epochs)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count >= 10:
        assert len({tuple(order) for order in orders}) == epochs
        assert orders[0] != [number for step in range(count) for number in Batches(Numbered(count), 1, seed=4).numbers(step)]


def test_a_batch_depends_on_its_step_alone():
    batches = Batches(Numbered(50), 8, seed=0)
    wanted = {step: batches.at(step)["ids"][:, 0].tolist() for step in range(20)}
    for step in random.Random(0).sample(range(20), 20):
        fresh = Batches(Numbered(50), 8, seed=0)
        assert fresh.at(step)["ids"][:, 0].tolist() == fresh.numbers(step) == wanted[step]
    # The order does not depend on the batch size: another cut of the same stream of samples.
    stream = list(chain(*(Batches(Numbered(50), 5, seed=0).numbers(step) for step in range(32))))
    assert stream == list(chain(*wanted.values()))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100])
def test_micro_batches_are_slices_of_the_whole(size):
    batch = Batches(Numbered(50), 8, seed=0).at(3)
    pieces = micro_batches(batch, size)
    assert len(pieces) == math.ceil(8 / size) and all(1 <= len(piece["ids"]) <= size for piece in pieces)
    assert torch.equal(torch.cat([piece["ids"] for piece in pieces]), batch["ids"])


def test_memory_does_not_grow_with_the_data():
    batches = Batches(Numbered(10**12), 16, seed=0)
    tracemalloc.start()
    numbers = [number for step in (0, 1, 10**9, 10**15) for number in batches.numbers(step)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert len(set(numbers)) == 64 and all(0 <= number < 10**12 for number in numbers)


# --- packing ---------------------------------------------------------------------------------------------------------


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The rooms left by best fit, found by looking at every row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def test_packing_places_all_overfills_none_and_fits_best():
    source = random.Random(0)
    for trial in range(60):
        capacity = source.choice((1, 7, 64, 512))
        lengths = [min(capacity, 1 + int(source.expovariate(4 / capacity))) for _ in range(source.randrange(200))]
        rows = pack(lengths, capacity)
        assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
        rooms = sorted(capacity - sum(lengths[item] for item in row) for row in rows)
        assert not rooms or rooms[0] >= 0
        assert rooms == best_fit_decreasing(lengths, capacity), trial
        assert pack(lengths, capacity) == rows
    lengths = [min(512, 1 + int(source.expovariate(1 / 90))) for _ in range(3000)]
    assert len(pack(lengths, 512)) <= math.ceil(sum(lengths) / 512) * 1.01
    assert pack([], 8) == []


# --- cutting long conversations --------------------------------------------------------------------------------------

LONG = EncodedChat(ids=list(range(20)), mask=[at in (3, 4, 5, 10, 11, 12, 13, 17, 18) for at in range(20)], ends=[6, 14, 19])


@pytest.mark.parametrize(
    "limit, length, ends, how",
    [
        (25, 19, [6, 14, 19], ""),
        (20, 19, [6, 14, 19], ""),
        (19, 19, [6, 14, 19], ""),
        (18, 14, [6, 14], "after a reply"),
        (14, 14, [6, 14], "after a reply"),
        (13, 6, [6], "after a reply"),
        (6, 6, [6], "after a reply"),
        (5, 5, [], "inside a reply"),
        (4, 4, [], "inside a reply"),
        (3, 3, [], "inside a reply"),  # nothing is learnt: whoever cuts leaves such a one out
    ],
)
def test_a_long_conversation_is_cut_after_its_last_whole_reply(limit, length, ends, how):
    assert cut(LONG, limit) == (EncodedChat(LONG.ids[:length], LONG.mask[:length], ends), how)


def conversation(*contents: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]}


def prepared_chats(records, tokenizer, tmp_path, block_size: int = 32, **options) -> tuple[TokenStore, TokenStore]:
    path = write_jsonl(tmp_path / "chats.jsonl", records)
    return prepare_sft([str(path)], tokenizer, tmp_path / "cache", block_size, **{"val_fraction": 0, **options})


def learnt(store: TokenStore, document: int, tokenizer) -> str:
    start, stop = int(store.starts[document]), int(store.starts[document + 1])
    return tokenizer.decode(store.ids(start, stop)[store.mask(start, stop)])


def test_long_conversations_are_cut_or_left_out_and_counted(tmp_path, tokenizer, capsys):
    records = [
        conversation("a", "bc", "d", "ef"),
        conversation("a", "bc", "d" * 40, "ef"),
        conversation("a", "xy" * 40, "d", "ef"),
        conversation("q" * 60, "never reached"),
        conversation("a", "z", "and a question left open"),
    ]
    train, _ = prepared_chats(records, tokenizer, tmp_path, block_size=60)
    assert [learnt(train, number, tokenizer) for number in range(2)] == ["bc<|im_end|>ef<|im_end|>", "bc<|im_end|>"]
    assert learnt(train, 3, tokenizer) == "z<|im_end|>"
    inside = learnt(train, 2, tokenizer)
    assert inside and ("xy" * 40).startswith(inside) and "<|im_end|>" not in inside  # no end is learnt where there was none
    assert train.documents == 4 and train.info["cuts"] == {"after a reply": 1, "inside a reply": 1}
    assert train.info["too_long"] == [f"{tmp_path / 'chats.jsonl'}:4"]
    lengths = np.diff(train.starts)
    assert lengths.max() == lengths[2] == 61  # 60 places, each with a next token
    assert train.text_bytes == len("bcef" + "bc" + inside + "z")
    for _ in range(2):  # told again when the data is found tokenised
        printed = capsys.readouterr().out
        assert "1 conversations are longer than block_size (60) and were cut after a reply" in printed
        assert "1 conversations are longer than block_size (60) and were cut inside a reply" in printed
        assert "1 conversations were left out, their first question alone filling block_size (60)" in printed
        prepared_chats_again = prepare_sft([str(tmp_path / "chats.jsonl")], tokenizer, tmp_path / "cache", 60, val_fraction=0)
        assert prepared_chats_again[0].folder == train.folder


def test_a_question_left_open_is_no_part_of_a_conversation():
    assert read_conversation(conversation("a", "b", "and c?")) == read_conversation(conversation("a", "b"))
    assert len(read_conversation(conversation("a", "b", "c", "d"))) == 4


def test_nothing_but_questions_is_no_data(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no usable conversation"):
        prepared_chats([conversation("q" * 60, "never reached")], tokenizer, tmp_path)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, "the conversation is empty"),
        (conversation("only a question"), "there is no assistant reply"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "turn 1: unknown role 'boss'"),
        (conversation("a", "b", "c", "half \ud83d"), r"turn 4 holds half of a character \(U\+D83D\)"),
        (conversation("a", " "), "turn 2 is empty"),
    ],
)
def test_bad_conversations_are_refused_or_counted(tmp_path, tokenizer, record, message):
    with pytest.raises(DataError, match=message):
        read_conversation(record)
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (conversation("a", "b"), record)), encoding="utf-8")
    with pytest.raises(DataError, match=rf"chats.jsonl:2: {message}"):
        prepare_sft([str(path)], tokenizer, tmp_path / "cache", 32)
    train, _ = prepare_sft([str(path)], tokenizer, tmp_path / "cache", 32, val_fraction=0, max_bad=1)
    assert train.documents == 1 and len(train.info["rejected"]) == 1


def test_a_template_that_rewrites_contents_is_refused(tmp_path, tokenizer_folder):
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = settings["chat_template"].replace("message['content']", "message['content'] | trim")
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")
    with pytest.raises(DataError, match="the chat template rewrites contents"):
        prepared_chats([conversation("a", "b "), conversation("a", "b")], Tokenizer(tmp_path), tmp_path)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path, tokenizer_folder):
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    refusing = "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    changed = {**settings, "chat_template": refusing + settings["chat_template"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed), encoding="utf-8")
    records = [conversation("a", "b"), {"messages": [{"role": "system", "content": "s"}, *conversation("a", "b")["messages"]]}]
    with pytest.raises(DataError, match=r"chats\.jsonl:2.*no system here"):
        prepared_chats(records, Tokenizer(tmp_path), tmp_path)


def test_conversations_are_tokenised_again_when_anything_changes(tmp_path, tokenizer, tokenizer_folder, chat_file):
    def folder(tokenizer=tokenizer, block_size=32, **options) -> str:
        return str(prepare_sft([str(chat_file)], tokenizer, tmp_path / "cache", block_size, **options)[0].folder)

    other = Tokenizer(tokenizer_folder)
    other.settings = {**other.settings, "chat_template": other.settings["chat_template"] + "\n"}
    folders = [folder(), folder(block_size=33), folder(val_fraction=0.4), folder(seed=1), folder(max_bad=1), folder(other)]
    assert len(set(folders)) == 6 and folder() == folders[0]


def test_copies_of_a_conversation_stand_on_one_side(tmp_path, tokenizer):
    records = [conversation(f"question {number % 20}", f"answer {number % 20}") for number in range(100)]
    train, val = prepared_chats(records, tokenizer, tmp_path, block_size=64, val_fraction=0.3)
    sides = [{learnt(store, number, tokenizer) for number in range(store.documents)} for store in (train, val)]
    assert all(sides) and not sides[0] & sides[1] and train.documents + val.documents == 100


# --- packed rows -----------------------------------------------------------------------------------------------------


@pytest.fixture
def chats(chat_file, tokenizer) -> list[EncodedChat]:
    records = [json.loads(line) for line in chat_file.read_text(encoding="utf-8").splitlines()]
    return [
        cut(chat, ROW + 1)[0] for chat in ChatFormat(tokenizer).encode_batch([read_conversation(record) for record in records])
    ]


@pytest.fixture
def rows(chat_file, tokenizer, tmp_path) -> SFTRows:
    store, _ = prepare_sft([str(chat_file)], tokenizer, tmp_path / "cache", ROW, val_fraction=0)
    return SFTRows(store, ROW, tokenizer.pad_id)


def test_a_row_holds_its_conversations_and_labels_them_from_themselves_only(rows, chats):
    batch = rows.load(range(len(rows)))
    ends = batch.pop("ends")
    assert all(values.shape == (len(rows), ROW) and values.dtype == np.int64 for values in batch.values())
    assert_ends_say_the_same({**batch, "ends": ends})
    seen = []
    for row in range(len(rows)):
        ids, labels, positions, documents = (batch[name][row] for name in ("ids", "labels", "positions", "documents"))
        for number in dict.fromkeys(documents[documents >= 0].tolist()):
            places = np.flatnonzero(documents == number)
            chat = chats[number]
            assert places.tolist() == list(range(places[0], places[0] + len(chat.ids) - 1))  # one piece
            assert ids[places].tolist() == chat.ids[:-1]
            wanted = [token if is_learnt else IGNORED for token, is_learnt in zip(chat.ids[1:], chat.mask[1:], strict=True)]
            assert labels[places].tolist() == wanted  # the mask moves along with the labels
            assert positions[places].tolist() == list(range(len(places)))
            seen.append(number)
        padding = documents == -1
        assert (ids[padding] == PAD).all() and (labels[padding] == IGNORED).all()
        assert not padding[:-1][~padding[1:]].any()  # at the end only
    assert sorted(seen) == list(range(len(chats)))
    assert rows.filled == pytest.approx((batch["documents"] >= 0).mean()) and rows.filled > 0.75


def test_every_reply_is_a_label_from_its_first_token_to_its_end(rows, chats, tokenizer):
    labels = rows.load(range(len(rows)))["labels"]
    assert (labels != IGNORED).sum() == sum(sum(chat.mask) for chat in chats) == rows.store.supervised
    assert (labels == tokenizer.eos_id).sum() == sum(len(chat.ends) for chat in chats) == 90
    assert (labels != PAD).all()


def unpacked(model, chats) -> torch.Tensor:
    """The summed loss of each conversation alone, without packing, positions or boundaries."""
    total = torch.zeros((), dtype=torch.float64)
    for chat in chats:
        labels = [token if is_learnt else IGNORED for token, is_learnt in zip(chat.ids, chat.mask, strict=True)][1:]
        total = total + nats(model, chat.ids[:-1], labels)
    return total


def gradients(model, loss) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(model.parameters()))


def test_packed_loss_and_gradients_are_the_unpacked_ones(rows, chats, double_model):
    batch = as_tensors(rows.load(range(len(rows))))
    packed = causal_lm_loss(double_model, batch)
    alone = unpacked(double_model, chats)
    torch.testing.assert_close(packed.sum, alone, rtol=1e-10, atol=0)
    assert int(packed.weight) == sum(sum(chat.mask) for chat in chats)
    pairs = zip(gradients(double_model, packed.sum), gradients(double_model, alone), strict=True)
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10 * reference.abs().max().item())
    merged = causal_lm_loss(double_model, {name: batch[name] for name in ("ids", "labels")})
    assert abs(merged.sum.item() - alone.item()) > 1  # without the boundaries it would be another


def test_padding_is_harmless(rows, double_model):
    batch = as_tensors(rows.load(range(len(rows))))
    packed = causal_lm_loss(double_model, batch)
    wanted = gradients(double_model, packed.sum)
    padding = batch["documents"] == -1
    assert padding.any()
    other = {**batch, "ids": torch.where(padding, 77, batch["ids"]), "positions": torch.where(padding, 5, batch["positions"])}
    empty = {"ids": PAD, "labels": IGNORED, "positions": 0, "documents": -1}
    batch["ends"] = batch["ends"][:, :1].expand(-1, ROW)  # as wide as the others, to be lengthened with them
    more = {name: torch.cat([values, torch.full((3, ROW), {**empty, "ends": ROW}[name])]) for name, values in batch.items()}
    for changed in (other, more):
        loss = causal_lm_loss(double_model, changed)
        torch.testing.assert_close(loss.sum, packed.sum, rtol=1e-12, atol=0)
        assert loss.weight == packed.weight
        for ours, reference in zip(gradients(double_model, loss.sum), wanted, strict=True):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10 * reference.abs().max().item())


def test_rows_say_what_they_are_made_of(rows, tmp_path):
    assert rows.describe(0) == f"row 0 (conversations {', '.join(map(str, rows.rows[0]))})"
    blocks = PretrainBlocks(store_of(tmp_path / "store", [[1] * 5, [2] * 5, [3] * 5]), 4, PAD)
    assert [blocks.describe(block) for block in range(4)] == [
        "block 0 (documents 0–0)", "block 1 (documents 0–1)", "block 2 (documents 1–2)", "block 3 (documents 2–2)",
    ]  # fmt: skip


def test_conversations_are_read_batch_by_batch(chat_file, tokenizer, tmp_path, monkeypatch, chats):
    monkeypatch.setattr(sft, "BATCH_CONVERSATIONS", 7)
    store, _ = prepare_sft([str(chat_file)], tokenizer, tmp_path / "small", ROW, val_fraction=0)
    assert store.ids(0, len(store)).tolist() == [token for chat in chats for token in chat.ids[: chat.ends[-1]]]


def test_processes_that_start_together_tokenise_once(tmp_path, tokenizer):
    """The second waits for the first, and a killed one's half-made folder is gone."""
    from etude.data import tokens

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n', encoding="utf-8")
    made = []

    def build(folder):
        time.sleep(0.3)
        made.append(folder)
        (folder / "x").write_text("x")

    found = []
    call = lambda: found.append(tokens.prepared(tmp_path / "cache", [path], "{}", {}, build))  # noqa: E731
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len(made) == 1
        and len({folder for folder, _ in found}) == 1
        and sorted(reused for _, reused in found) == [False, True, True]
    )
    folder = found[0][0]
    shutil.rmtree(folder)
    (folder.parent / f".{folder.name}.1.abc.tmp").mkdir()
    call()
    assert sorted(entry.name for entry in folder.parent.iterdir()) == [".locks", folder.name]
