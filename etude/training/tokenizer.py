"""The tokenizer stage: show what would be used, learn a vocabulary, prove that it is sound."""

import dataclasses
import hashlib
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from etude import paths
from etude.chat import ChatFormat
from etude.corpus.conversations import to_messages
from etude.corpus.inputs import find_files
from etude.corpus.jsonl import Rejects, read_texts
from etude.corpus.streams import COMPRESSED_SUFFIXES
from etude.errors import VerificationError
from etude.files import clear_leftovers
from etude.runlog import progress_bar
from etude.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from etude.training.config import TokenizerConfig

COMPRESSION = 4  # about how many bytes of text a byte of a compressed file holds: only sizes the sample
VERIFY_BYTES = 2_000_000  # of the training text, for compression and round trips


def show_config(config: TokenizerConfig) -> None:
    """Print what would be used. Raises :class:`DataError` when there is nothing to learn from."""
    files = find_files(config.data)
    for file in files:
        print(f"data      {paths.typed(file)}  {file.stat().st_size:,} bytes")
    share = _share(config, files)
    print(
        f"sample    {'all of the text' if share >= 1 else f'about {share:.1%} of the documents'} (--max_bytes {config.max_bytes:,})"
    )
    print(f"vocab     {config.vocab_size:,} tokens, {len(SPECIAL_TOKENS)} of them special: {' '.join(SPECIAL_TOKENS)}")
    print(f"output    {paths.typed(config.output)}")


def train(config: TokenizerConfig) -> Tokenizer:
    """Learn the vocabulary from a sample of the data, in memory that does not grow with it."""
    rejects = Rejects(config.max_bad)
    tokenizer = train_tokenizer(_sample(config, rejects), config.output, config.vocab_size, config.default_system)
    for file in Path(config.output).iterdir():
        clear_leftovers(file)  # of a run that was killed while it wrote
    if summary := rejects.summary():
        print(summary)
    print(f"tokenizer {paths.typed(config.output)}: {len(tokenizer):,} tokens")
    return tokenizer


def _texts(config: TokenizerConfig, rejects: Rejects) -> Iterator[str]:
    """Documents, and conversations with their roles, about as the chat template frames them: each turn of a chat costs
    those words anew, so they should be short.
    """

    def said(record: dict) -> str:
        return "\n".join(f"{message['role']}\n{message['content']}" for message in to_messages(record))

    for _, text in read_texts(find_files(config.data), rejects, config.text_key, config.text_unit, without_key=said):
        yield text


def _share(config: TokenizerConfig, files: list[Path]) -> float:
    sizes = (file.stat().st_size * (COMPRESSION if file.suffix in COMPRESSED_SUFFIXES else 1) for file in files)
    return config.max_bytes / max(1, sum(sizes)) if config.max_bytes else 1.0


def _sample(config: TokenizerConfig, rejects: Rejects) -> Iterator[str]:
    files = find_files(config.data)
    share, used = _share(config, files), 0
    with progress_bar("reading", config.max_bytes if share < 1 else sum(f.stat().st_size for f in files), "B") as bar:
        for number, text in enumerate(_texts(config, rejects)):
            if share < 1:
                digest = hashlib.blake2b(f"{config.seed},{number}".encode(), digest_size=8).digest()
                if int.from_bytes(digest, "big") >= share * 2**64:
                    continue
            size = len(text.encode("utf-8"))
            used += size
            if config.max_bytes and used > config.max_bytes * 1.05:
                return
            bar.update(size)
            yield text


def verify(config: TokenizerConfig) -> None:
    """Prove byte-exact round trips, special-token safety and the chat template; print the compression by script.

    Raises :class:`VerificationError` naming the text that fails.
    """
    tokenizer = Tokenizer(config.output)
    texts = _verification_texts(config)
    for text in [*HARD_TEXTS, *_random_texts(config.seed, 500), *texts]:
        verify_round_trip(tokenizer, text)
    for token in SPECIAL_TOKENS:
        verify_round_trip(tokenizer, f"a {token}{token} b")
        if tokenizer.encode_template(token) != [tokenizer.id_of(token)]:
            raise VerificationError(f"{tokenizer.folder}: the template's {token} is not one token")
        if tokenizer.id_of(token) in tokenizer.encode(token):
            raise VerificationError(f"{tokenizer.folder}: {token} in plain text becomes the control token")
    verify_template(tokenizer)
    print(
        f"verified  {len(HARD_TEXTS) + 500 + len(texts):,} texts come back byte for byte; special tokens in text stay text; the template holds"
    )
    for script, (size, characters, count) in compression(tokenizer, texts).items():
        print(f"          {script:<8} {size / count:5.2f} bytes and {characters / count:5.2f} characters per token")


def verify_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    if tokenizer.special_ids.intersection(ids):
        raise VerificationError(f"{tokenizer.folder}: special-token ids come from plain text: {text[:80]!r}")
    if tokenizer.decode(ids) != text or b"".join(map(tokenizer.token_bytes, ids)) != text.encode("utf-8"):
        raise VerificationError(f"{tokenizer.folder}: this text does not come back byte for byte: {text[:80]!r}")


def verify_template(tokenizer: Tokenizer) -> None:
    """Our ids against transformers' ``apply_chat_template``, mask included, and the prompt as a prefix."""
    from transformers import AutoTokenizer

    messages = [
        {"role": "system", "content": "Be brief. 简短。"},
        {"role": "user", "content": "Hello, 世界!\n 2 + 2?"},
        {"role": "assistant", "content": "4 🙂"},
        {"role": "user", "content": "谢谢"},
        {"role": "assistant", "content": "不客气。"},
    ]
    reference = AutoTokenizer.from_pretrained(str(tokenizer.folder))
    for first in (0, 1):  # with and without a system turn
        chat = ChatFormat(tokenizer).encode(messages[first:])
        rendered = reference.apply_chat_template(messages[first:], return_dict=True, return_assistant_tokens_mask=True)
        if chat.ids != list(rendered["input_ids"]) or chat.mask != [bool(flag) for flag in rendered["assistant_masks"]]:
            raise VerificationError(
                f"{tokenizer.folder}: apply_chat_template and Etude disagree on a conversation's ids or mask"
            )
        prompt = ChatFormat(tokenizer).prompt(messages[first:-1])
        if chat.ids[: len(prompt)] != prompt:
            raise VerificationError(f"{tokenizer.folder}: the generation prompt is no prefix of the training ids")
    if tokenizer.pad_id == tokenizer.eos_id:
        raise VerificationError(f"{tokenizer.folder}: pad and eos are one token, so the end of a reply could not be learnt")


HARD_TEXTS = (
    "", " ", "\n", "\r\n\t  x  ", "don't stop, it's 3.14159 and 1,234,567!",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。", "繁體與简体 混排 mixed with English，以及１２３全角。",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 é e\u0301 ﷽ \u200b\u200d\ufeff", "def f(x):\n\treturn {'a': [x**2, 0x1F]}  # ünïcödé\n",
    "日本語のテキスト、한국어 텍스트, русский, ελληνικά, עברית, العربية, हिन्दी", "\x00\x01\x7f\x80\U0010ffff\uffff",
)  # fmt: skip


def _random_texts(seed: int, count: int) -> Iterator[str]:
    """Random strings over all of Unicode but surrogates, which are no characters."""
    source = random.Random(seed)
    for _ in range(count):
        points = (source.randrange(source.choice((0x80, 0x3000, 0xD800, 0x110000))) for _ in range(source.randrange(1, 60)))
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def _verification_texts(config: TokenizerConfig) -> list[str]:
    """A small sample from everywhere in the data, so that each of its languages is there."""
    return list(_sample(dataclasses.replace(config, max_bytes=VERIFY_BYTES), Rejects(config.max_bad)))


def compression(tokenizer: Tokenizer, texts: list[str]) -> dict[str, tuple[int, int, int]]:
    """(bytes, characters, tokens) of the texts by their main script, "Chinese" or "other", and of all together."""
    sums: dict[str, list[int]] = {}
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        han = sum("CJK UNIFIED" in unicodedata.name(character, "") for character in text[:2000])
        for script in ("Chinese" if han * 4 > min(len(text), 2000) else "other", "all"):
            values = sums.setdefault(script, [0, 0, 0])
            for index, value in enumerate((len(text.encode("utf-8")), len(text), len(ids))):
                values[index] += value
    return {script: tuple(sums[script]) for script in ("Chinese", "other", "all") if script in sums and sums[script][2]}
