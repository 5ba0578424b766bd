"""Byte-level BPE: trained on a person's text, kept as a Hugging Face folder.

Byte-level BPE starts from the 256 bytes, so any string can be written and read back byte for byte; there is no
normaliser, which would break that. The split into words is Qwen2's, digits one by one, which llama.cpp knows as
``qwen2`` (GPT-2's idea: https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf).
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from etude.errors import DataError, MismatchError, UsageError
from etude.files import whole_file

DOCUMENT_END = "<|endoftext|>"  # id 0: separates documents, and pads
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"  # eos: what ends a reply
RESERVED = tuple(f"<|reserved_{number}|>" for number in range(5))  # room for later needs without a new vocabulary
SPECIAL_TOKENS = (DOCUMENT_END, TURN_START, TURN_END, *RESERVED)

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # of tokenizer_config.json
MAX_FILE = 256 * 2**20  # bytes; Gemma 3's tokenizer.json, 262,144 tokens, has 33 MB

QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# ChatML, as Qwen and many others have it. {% generation %} marks the tokens a model is to produce, for
# apply_chat_template(return_assistant_tokens_mask=True): a reply's content and the token that ends it.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' and DEFAULT_SYSTEM -%}
{{- '<|im_start|>system\\n' + DEFAULT_SYSTEM + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def chat_template(default_system: str = "") -> str:
    """The template, opening each conversation that has no system turn with ``default_system`` if that is given."""
    return f"{{%- set DEFAULT_SYSTEM = {json.dumps(default_system, ensure_ascii=False)} -%}}\n" + CHAT_TEMPLATE


class Tokenizer:
    """A tokenizer folder, ready to encode. Text that looks like a special token stays text, always.

    Ids come from two doors: :meth:`encode` for text, which can never yield a control id, and :meth:`encode_template`
    for the chat template's own words, which may.
    """

    def __init__(self, folder: str | Path):
        import tokenizers

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise MismatchError(f"{self.folder}: there is no tokenizer here; run: python train/train_tokenizer.py all")
        if path.stat().st_size > MAX_FILE:
            raise DataError(f"{path}: larger than {MAX_FILE / 2**20:.0f} MiB, which no tokenizer is; it is damaged")
        try:
            self.json = path.read_text(encoding="utf-8")
            self._template_words = tokenizers.Tokenizer.from_str(self.json)
            self._text = tokenizers.Tokenizer.from_str(self.json)
        except BaseException as error:  # the Rust library raises bare Exception; where it panics, not even that
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{path}: not a readable tokenizer ({str(error)[:300]!r})") from None
        self._size = max(self.vocabulary.values(), default=-1) + 1
        if self._size > 2 * len(self.vocabulary) + 1000:  # a few gaps are usual; sizes that nobody has memory for are not
            raise DataError(f"{path}: {len(self.vocabulary)} tokens with ids up to {self._size - 1:,}; the file is damaged")
        self._text.encode_special_tokens = True
        for backend in (self._text, self._template_words):
            backend.no_padding()
            backend.no_truncation()
        self.settings = self._read_settings()

    def _read_settings(self) -> dict:
        path = self.folder / "tokenizer_config.json"
        template = self.folder / "chat_template.jinja"  # where newer versions of transformers keep it
        settings = {}
        for file in (path, template):
            if not file.is_file():
                continue
            if file.stat().st_size > MAX_FILE:
                raise DataError(f"{file}: larger than {MAX_FILE / 2**20:.0f} MiB, which no such file is; it is damaged")
            try:
                text = file.read_text(encoding="utf-8")
                settings = settings | {"chat_template": text} if file == template else json.loads(text)
                json.dumps(settings, ensure_ascii=False).encode("utf-8")  # half a character, "\\ud800", has no bytes
            except (ValueError, RecursionError) as error:
                kind = "UTF-8" if file == template else "JSON"
                raise DataError(f"{file}: not valid {kind} ({str(error)[:300]!r})") from None
            if not isinstance(settings, dict):
                raise DataError(f"{file}: not a JSON object; the file is damaged")
        if settings.get("auto_map"):
            raise MismatchError(f"{path}: auto_map names code of the tokenizer's own, which Etude never runs")
        for key in NAMED_TOKENS:
            value = settings.get(key)
            if not isinstance(value.get("content") if isinstance(value, dict) else value, str | None):
                raise DataError(f"{path}: {key} ({str(value)[:100]!r}) is no token's text; the file is damaged")
        return settings

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary and the chat template: what a model was trained with."""
        identity = self.json + str(self.settings.get("chat_template"))
        return hashlib.sha256(identity.encode("utf-8")).hexdigest()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, special and added ones included."""
        return self._text.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        """Tokens in the vocabulary, special and added ones included: the size that a model's embedding needs."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; ``<|im_end|>`` in it is nine harmless characters and more, not the control token."""
        return self._text.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self._text.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_template(self, text: str) -> list[int]:
        """Ids of the chat template's own text, special tokens among them."""
        return self._template_words.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ``ids``; bytes that are no UTF-8 come out as U+FFFD."""
        return self._template_words.decode(list(ids), skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        return self._text.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for (a byte-level token may hold a part of a character); b"" for special tokens."""
        token = self._text.id_to_token(token_id)
        if token is None or token_id in self.special_ids:
            return b""
        if self._is_byte_level:
            table = _byte_of_character()
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        # SentencePiece, as Llama 2 has it: U+2581 is a space, <0x0A> a byte
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()

    @cached_property
    def byte_lengths(self) -> list[int]:
        """How many bytes each token stands for, by id: counting over a corpus needs it fast."""
        return [len(self.token_bytes(token_id)) for token_id in range(len(self))]

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self.json).get("decoder") or {}
        return "ByteLevel" in (part.get("type") for part in [decoder, *decoder.get("decoders", [])])

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._text.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def eos_id(self) -> int:
        """What ends a reply."""
        return self._named_id("eos_token", TURN_END)

    @cached_property
    def document_end_id(self) -> int:
        """What stands between documents: ``<|endoftext|>`` where there is one, else eos."""
        found = self.id_of(DOCUMENT_END)
        return self.eos_id if found is None else found

    @cached_property
    def pad_id(self) -> int:
        named = self._token_name("pad_token")
        found = self.id_of(named) if named else None
        return self.document_end_id if found is None else found

    @cached_property
    def bos_id(self) -> int | None:
        """What a foreign model wants before raw text; Etude's own tokenizers have none."""
        probe = self._template_words.encode("a", add_special_tokens=True).ids
        plain = self._template_words.encode("a", add_special_tokens=False).ids
        return probe[0] if len(probe) > len(plain) and probe[1 : 1 + len(plain)] == plain else None

    def _token_name(self, key: str) -> str | None:
        value = self.settings.get(key)
        return value.get("content") if isinstance(value, dict) else value

    def _named_id(self, key: str, default: str) -> int:
        name = self._token_name(key) or default
        found = self.id_of(name)
        if found is None:
            raise MismatchError(f"{self.folder}: the {key} {name[:100]!r} is not in the vocabulary")
        return found

    def render(self, messages: tuple[tuple[str, str], ...], add_generation_prompt: bool = False) -> str:
        """The chat template's text for ``((role, content), ...)``."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.settings.get("chat_template")
        if not template:
            raise MismatchError(f"{self.folder}: this tokenizer has no chat template, so it cannot be used for chat or SFT")
        if not isinstance(template, str):
            raise MismatchError(f"{self.folder}: chat_template is not one template but a {type(template).__name__}; choose one")
        tokens = {key: self._token_name(key) for key in NAMED_TOKENS}
        try:
            rendered, _ = render_jinja_template(
                conversations=[[{"role": role, "content": content} for role, content in messages]],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                **{key: token for key, token in tokens.items() if token},
            )
        except Exception as error:  # a template is a small program, and fails in as many ways
            reason = "".join(character for character in str(error)[:300] if character.isprintable())
            whose = "" if type(error) is TemplateError else f"{self.folder}: "  # "": the template itself raises it
            raise DataError(f"{whose}the chat template refuses this conversation: {reason}") from None
        return rendered[0]

    def save(self, folder: str | Path, max_length: int | None = None) -> None:
        """Write the folder's files into ``folder``: a model carries its tokenizer."""
        settings = dict(self.settings)
        if max_length is not None:
            settings["model_max_length"] = max_length
        write_files(folder, self.json, settings)


def write_files(folder: str | Path, tokenizer_json: str, settings: dict) -> None:
    for name, text in (
        ("tokenizer.json", tokenizer_json),
        ("tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n"),
    ):
        with whole_file(Path(folder) / name) as path:
            path.write_text(text, encoding="utf-8", newline="\n")


def train_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int, default_system: str = "") -> Tokenizer:
    """Learn a vocabulary of exactly ``vocab_size`` tokens from ``texts`` and write it to ``folder``."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UsageError(f"vocab_size ({vocab_size}) must be at least {smallest}: 256 bytes and the special tokens")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=64,  # bytes; longer ones are only ever noise, such as rules of dashes
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator((piece for text in texts for piece in _cut_long_runs(text)), trainer=trainer)
    if backend.get_vocab_size() < vocab_size:
        raise DataError(
            f"the text yields only {backend.get_vocab_size()} tokens, fewer than vocab_size ({vocab_size}); "
            "give more text or a smaller --vocab_size"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": DOCUMENT_END,
        "additional_special_tokens": [TURN_START, *RESERVED],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,  # unbounded; a model's folder has the model's own
        "chat_template": chat_template(default_system),
    }
    write_files(folder, backend.to_str(pretty=True), settings)
    return Tokenizer(folder)


_LONG_RUN = re.compile(r"[^\W\d_]{33,}|(?:[^\w\s]|_){33,}|\s{33,}")  # letters, symbols, or white space


def _cut_long_runs(text: str) -> Iterator[str]:
    """Cut runs of over 32 letters or symbols. The trainer counts distinct words; Chinese without punctuation would
    otherwise be one word a paragraph, each of them kept in memory, none ever seen twice, and every merge walking all of it.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.start()]
        yield from (run[0][at : at + 32] for at in range(0, len(run[0]), 32))
        start = run.end()
    yield text[start:]


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, inverted: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + number): byte for number, byte in enumerate(others)}
